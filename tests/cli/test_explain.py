"""fewbit explain: what a newcomer reads, and that bad input is one sentence."""

import json
from fractions import Fraction

import pytest

PI = "3.1415926535"


def test_without_a_format_the_usual_ones_are_listed_and_the_walk_is_offered(fewbit):
    ran = fewbit("explain", PI)
    lines = ran.out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["fp32", "tf32", "bf16", "fp16"]
    assert "0 10000000 10010010000111111011011  3.1415927410125732421875" in lines[1]
    assert "fewbit explain 3.1415926535 --format fp32" in ran.err


def test_the_walk_through_pi(fewbit):
    out = fewbit("explain", PI, "--format", "fp32").out
    for said in (
        "3 = 11\n",
        "0.1415926535 x 2 = 0.283185307 -> 0",
        "0.566370614 x 2 = 1.132741228 -> 1",
        "11.0010010000111111011010101000100... = 1.10010010000111111011010101000100... x 2^1",
        "1 + 127 = 128 = 10000000",
        "1.10010010000111111011010 | 101000100...",
        "more than half: up",
        "cut off (truncated)      0 10000000 10010010000111111011010",
        "Code: 0 10000000 10010010000111111011011 ",
        "0x40490fda",
        "0x40490fdc",
        "+8.751e-08, 0.3671 units in the last place",
    ):
        assert said in out


@pytest.mark.parametrize("number", ["-3.5", "-0x1.cp1", "-7/2", "-35e-1"])
def test_negative_numbers_are_no_options(fewbit, number):
    found = fewbit("explain", number, "--format", "e4m3fn", "--json").json["numbers"][0]
    assert found["held"]["bits"] == "1 1000 110"
    assert found["held"]["value"] == {"exact": "-3.5", "float": -3.5}
    assert found["text"] == number
    assert "-inf" in fewbit("explain", "-inf", "--format", "bf16").out
    assert fewbit("explain", "-pi", "--format", "int8", "--json").json["numbers"][0]["held"]["code"] == "0xfd"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("1e-40", "--format", "fp32"), "a subnormal, with exponent field 0"),
        (("1e39", "--format", "fp32"), "a cast without saturation gives Inf"),
        (("1000", "--format", "e4m3fn"), "gives NaN, because e4m3fn has no Inf"),
        (("460", "--format", "e4m3fn"), "a cast without saturation gives the same"),
        (("70000", "--format", "fp16"), "kept for Inf and NaN"),
        (("9", "--format", "e2m1"), "every cast saturates"),
        (("1e-9", "--format", "e4m3fn"), "it is lost"),
        (("0", "--format", "e8m0"), "e8m0 has no zero"),
        (("-1", "--format", "ue4m3"), "ue4m3 has no sign"),
        (("0.1", "--format", "micro1"), "0.1 is beyond the smallest value of micro1, 0.5, and becomes it"),
        (("nan", "--format", "int4"), "int4 has no code for NaN"),
        (("nan", "--format", "fp16"), "fp16 keeps it"),
        (("-0", "--format", "e4m3fnuz"), "so -0 becomes 0"),
        (("2.5", "--format", "e2m1"), "exactly half: a tie"),
        (("1.96875", "--format", "e4m3fn"), "The carry runs through every digit"),
        (("-3.5", "--format", "int4"), "a tie, to the even one"),
        (("-3", "--format", "int4"), "2^4 - 3 = 13"),
        (("0.3", "--format", "q1.6"), "Code: 00.010011 "),
        (("0.3", "--format", "nf4"), "whose middle is"),
        (("0.3", "--format", "mxfp4"), "scale in e8m0"),
        (("0.1", "0.2", "--format", "int4"), "number  format"),
    ],
)
def test_every_case_is_told_in_words(fewbit, words, said):
    ran = fewbit("explain", *words)
    assert ran.code == 0
    assert said in ran.out


def test_a_block_shows_its_scale_and_what_the_outlier_costs(fewbit):
    words = ("explain", "0.1", "0.2", "-0.3", "8", "--format", "mxfp4")
    out = fewbit(*words).out
    assert "scale in e8m0: 10000000 = 2\n" in out
    assert "Without 8 the scale would be 0.0625:" in out
    block = fewbit(*words, "--json").json["blocks"][0]
    assert block["without_largest"]["left_out"] == "8"
    assert block["without_largest"]["squared_error_of_the_others_here"]["exact"] == "0.14"
    assert [e["text"] for e in block["without_largest"]["elements"]] == ["0.1", "0.2", "-0.3"]
    total = sum(Fraction(e["error"]["exact"]) ** 2 for e in block["elements"])
    assert total == Fraction(block["squared_error"]["exact"])


def test_nf4_is_a_table_for_one_number_and_a_block_format_for_several(fewbit):
    assert fewbit("explain", "0.3", "--format", "nf4", "--json").json["blocks"] == []
    assert fewbit("explain", "0.3", "1", "--format", "nf4", "--json").json["numbers"] == []


def test_codes_the_other_way_round(fewbit):
    out = fewbit("explain", "--code", "0x7e", "--format", "e4m3fn", "--format", "int8").out
    assert "1.110 in binary x 2^8 = 448" in out
    assert "value             126" in out
    found = fewbit("explain", "--code", "0b1111111", "--format", "e4m3fn", "--json").json["codes"][0]
    assert found["held"]["value"]["exact"] == "nan"
    assert found["held"]["value"]["float"] is None
    assert "0.01 in binary x 2^-14" in fewbit("explain", "--code", "1", "--format", "e5m2").out


def test_json_has_every_digit(fewbit):
    found = fewbit("explain", "1/3", "--format", "fp32", "--json").json["numbers"][0]
    assert found["given"]["exact"] == "1/3"
    held, error = (
        Fraction(found[key]["exact"] if key == "error" else found[key]["value"]["exact"])
        for key in ("held", "error")
    )
    assert held - error == Fraction(1, 3)
    assert found["walk"]["truncated"]["code"] == "0x3eaaaaaa"
    assert found["held"]["code"] == "0x3eaaaaab"
    assert json.dumps(found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no number is given"),
        (("three",), "'three' is not a number"),
        (("1", "--fromat", "fp32"), "'--fromat' is not a number"),
        (("1e99999999999",), "beyond +-2000"),
        (("1e301",), "beyond 1e+-300"),
        (("-1e-301", "--format", "fp32"), "beyond 1e+-300"),
        (("9" * 390,), "beyond 1e+-300"),
        (("1", "--format", "e4m4"), "there is no grid or block format named 'e4m4'; did you mean"),
        (("1", "--format", ""), "`fewbit formats` lists them all"),
        (("1", "--format", "q9.9"), "1 to 16 bits"),
        (("1", "2", "--format", "mxfp4-g0"), "group size 0"),
        (("--code", "7", "--format", "mxfp4"), "mxfp4 is a block format, whose elements are e2m1"),
        (("1", "nan", "--format", "mxfp4"), "takes finite numbers, got nan"),
        (("--code", "0x100", "--format", "e4m3fn"), "its codes go from 0 to 0xff"),
        (("--code", "seven", "--format", "e4m3fn"), "is not a bit pattern"),
        (("--code", "7"), "means nothing without a format"),
        (("1", "--code", "7", "--format", "e2m1"), "are both given"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(fewbit, words, said):
    ran = fewbit("explain", *words)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert said in ran.err


def test_the_largest_and_the_least_number_that_is_taken(fewbit):
    for text, held in (("-1e300", "1 11111110"), ("1e-300", "0 00000000")):
        ran = fewbit("explain", text, "--format", "fp32")
        assert (ran.code, ran.err) == (0, "")
        assert f"Code: {held}" in ran.out
        assert "inf" not in ran.out.split("Code:")[1]


def test_a_block_format_takes_another_block_after_its_name(fewbit):
    lines = fewbit("explain", "1", "2", "3", "8", "--format", "mxfp4-g2").out.splitlines()
    assert lines[0].startswith("4 numbers in mxfp4-g2")
    steps = [line.split()[:2] for line in lines[4:8]]
    assert steps == [["1", "0.5"], ["2", "0.5"], ["3", "2"], ["8", "2"]]


def test_help_ends_with_an_example(fewbit):
    assert (
        fewbit("explain", "--help")
        .out.strip()
        .splitlines()[-1]
        .strip()
        .startswith("Example:  fewbit explain ")
    )
