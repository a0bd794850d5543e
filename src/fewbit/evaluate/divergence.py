"""How far a result's predictions are from the original's, token by token.

    KL(p || q) = sum_v p_v (log p_v - log q_v)      in nats; p the original, q the result

Perplexity asks how well the text is predicted, and on one text errors of both signs cancel; KL asks how
much of the original's whole distribution survived, so it ranks methods with far fewer tokens (S. Kullback
and R. A. Leibler, On Information and Sufficiency, 1951). The direction matters: this one charges a result
that rules out what the original held likely. Top-1 agreement is the share of positions at which both would
say the same word.

Shapes: n positions, v vocabulary.
"""

import torch
from torch import Tensor


def kl_divergence(original: Tensor, result: Tensor) -> Tensor:
    """KL(original || result) in nats per position [n], from log probabilities [n, v] in float32.

    Exactly 0 for equal inputs. A word that both rule out (-inf) adds 0; one that only the result rules out,
    +inf.
    """
    # The only NaN that clean inputs can make is 0 * inf at words the original rules out: their share is 0.
    terms = original.exp().mul_(original - result)
    return terms.nan_to_num_(nan=0.0, posinf=float("inf"), neginf=float("-inf")).sum(dim=-1)


def top1_agreement(original: Tensor, result: Tensor) -> Tensor:
    """Per position [n] bool: is the likeliest word of both the same one? Any monotone scores [n, v] do."""
    return torch.eq(original.argmax(dim=-1), result.argmax(dim=-1))
