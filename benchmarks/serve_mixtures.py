"""Native mixtures of experts through the plugin of vLLM: greedy tokens beside ours, and their memory.

    python benchmarks/serve_mixtures.py --vllm PYTHON [--only TEXT ...] [--dtype float32]

PYTHON is the interpreter of an environment with vLLM and fewbit. The models are random (8 experts of which 2
run, 2 layers, 128 wide; heads as wide as vLLM's CPU kernels know them), so nothing of them is text; but the
router, the shared experts and every expert have to be right for tokens to agree. Four prompts of 12 random
tokens go on greedily for 32. Rows "none" are the float model, in vLLM's own layers: where it parts from ours,
the plugin is not the reason. Memory is that of the experts' tensors as vLLM's process holds them, beside the
same tensors in the file, and in floats of two bytes.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent
TOKENS, PROMPTS = 32, 4
SHAPE = {
    "vocab_size": 288, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
    "num_experts_per_tok": 2,
}  # fmt: skip
LATENT = {"kv_lora_rank": 512, "q_lora_rank": 64, "v_head_dim": 64, "qk_nope_head_dim": 64}
MODELS = {  # class in transformers: settings, what vLLM's configuration must say besides
    "Mixtral": ({"num_local_experts": 8, "head_dim": 32}, {}),
    "Qwen2Moe": ({"num_experts": 8, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128}, {}),
    "Qwen3Moe": ({"num_experts": 8, "moe_intermediate_size": 64, "head_dim": 32}, {}),
    "DeepseekV3": (
        {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
         "moe_intermediate_size": 64, "num_key_value_heads": 4, "qk_rope_head_dim": 64, **LATENT},
        {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    ),
}  # fmt: skip
RECIPES = {"none": None, "nf4": [], "higgs": ["--set", "bits=4", "--set", "group_size=64"]}

SERVE = """
import json, os, sys
os.environ.update(HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")
os.environ.update(VLLM_ALLOW_INSECURE_SERIALIZATION="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
def held(model):
    found = [m for n, m in model.named_modules() if type(m).__name__ == "PackedExperts"]
    return sum(b.nbytes for m in found for b in m.buffers())
if __name__ == "__main__":
    import torch
    from vllm import LLM, SamplingParams
    shared = {"kv_cache_memory_bytes": 1 << 28} if torch.cuda.is_available() else {}  # with others on the GPU
    model, dtype, ids, tokens = json.loads(sys.argv[1])
    llm = LLM(model, dtype=dtype, max_model_len=96, enforce_eager=True, gpu_memory_utilization=0.1, **shared)
    bytes_held = sum(llm.apply_model(held))
    prompts = [{"prompt_token_ids": i} for i in ids]
    out = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    print("FOUND" + json.dumps([bytes_held, [list(o.outputs[0].token_ids) for o in out]]))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", required=True, help="interpreter of an environment with vLLM and fewbit")
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose names hold one of these")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    names = [f"{name} {recipe}" for name in MODELS for recipe in RECIPES]
    if not any(o in name for name in names for o in args.only):
        parser.error(f"no row holds {' or '.join(args.only)}; there are {'; '.join(names)}")
    print("| model | recipe | tokens of 32 that agree, by prompt | experts in memory / file / float16, kB |")
    print("|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            for recipe in RECIPES:
                if any(o in f"{name} {recipe}" for o in args.only):
                    row = travel(Path(folder), args.vllm, name, recipe, args.dtype)
                    print(f"| {name} | {recipe} | {row} |", flush=True)


def travel(folder: Path, vllm: str, name: str, recipe: str, dtype: str) -> str:
    """Make, quantize, generate on both sides, compare."""
    import torch

    import fewbit

    if not (source := folder / name).exists():
        save(name, source)
    made = source if recipe == "none" else folder / f"{name}-{recipe}"
    if made != source:
        words = ["quantize", str(source), "-r", recipe, *RECIPES[recipe], "--samples", "4", "-o", str(made)]
        subprocess.run([sys.executable, "-m", "fewbit.cli.main", *words], check=True, capture_output=True)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | MODELS[name][1]))
    ids = torch.randint(4, 288, (PROMPTS, 12), generator=torch.Generator().manual_seed(3)).tolist()
    (script := folder / "serve.py").write_text(SERVE)
    said = subprocess.run(
        [vllm, str(script), json.dumps([str(made), dtype, ids, TOKENS])], capture_output=True, text=True
    )
    found = [line for line in said.stdout.splitlines() if line.startswith("FOUND")]
    if not found:
        reasons = [line for line in (said.stdout + said.stderr).splitlines() if "Error: " in line]
        return f"failed | {(reasons or ['no reason given'])[0].rpartition('Error: ')[2][:200]}"
    held, theirs = json.loads(found[0].removeprefix("FOUND"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = fewbit.load(made, device=device, dtype=getattr(torch, dtype))
    agree = []
    for prompt, other in zip(ids, theirs, strict=True):
        own = model.generate(
            torch.tensor([prompt], device=device), max_new_tokens=TOKENS, eos_token_id=None, do_sample=False
        )[0, len(prompt) :].tolist()
        agree.append(next((i for i, (a, b) in enumerate(zip(own, other, strict=True)) if a != b), TOKENS))
    if made == source:
        return f"{', '.join(map(str, agree))} | "
    stored, floats = sizes(made)
    return f"{', '.join(map(str, agree))} | {held / 1e3:.1f} / {stored / 1e3:.1f} / {floats / 1e3:.1f}"


def save(name: str, folder: Path) -> None:
    """A random model wide enough in its logits that tokens differ, with the tests' tokenizer."""
    import torch
    import transformers

    sys.path.insert(0, str(ROOT.parent / "tests"))
    from tiny import tiny_tokenizer

    torch.manual_seed(20)
    config = getattr(transformers, f"{name}Config")(**SHAPE | MODELS[name][0])
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def sizes(made: Path) -> tuple[int, int]:
    """Bytes of the experts' tensors in the file, and of their weights in floats of two bytes."""
    from safetensors import safe_open

    modules = json.loads((made / "config.json").read_text())["quantization_config"]["modules"]
    inside = {name for name in modules if ".experts." in name}
    with safe_open(made / "model.safetensors", "pt") as file:
        names = [n for n in file.keys() if n.rpartition(".")[0] in inside]  # noqa: SIM118
        stored = sum(file.get_tensor(n).nbytes for n in names)
    return stored, 2 * sum(math.prod(modules[name]["shape"]) for name in inside)


if __name__ == "__main__":
    main()
