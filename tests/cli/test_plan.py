"""qnext plan: the table, the verdict, the exit code, and where configs come from."""

from __future__ import annotations

import json
import re

import pytest

from qnext.engine.plan import GPUS, preset

NEXT_80B = ("--dtype", "fp8", "--context", "262144", "--concurrency", "8")


def test_the_80b_in_fp8_fits_one_h200(qnext):
    done = qnext("plan", "80b", "--gpu", "h200", *NEXT_80B)
    assert done.code == 0
    assert re.search(r"^routed experts +77,309,411,328 +72\.000$", done.out, re.MULTILINE)
    rows = re.findall(r"^[A-Za-z].{33} +([\d,]+) +[\d.]+$", done.out, re.MULTILINE)
    numbers = [int(row.replace(",", "")) for row in rows]
    assert sum(numbers[:-1]) == numbers[-1] <= GPUS["h200"]
    assert "\nfits: " in done.out


def test_json_holds_the_same(qnext):
    facts = json.loads(qnext("plan", "80b", "--gpu", "h200", *NEXT_80B, "--json").out)
    assert facts["fits"] is True
    assert facts["slot_bytes"] == 77_271_040
    assert facts["block_bytes"] == 16 * 26_624
    assert facts["total_bytes"] == sum(facts["bytes"].values()) <= facts["memory_bytes"]
    assert facts["bytes"]["kv_cache"] == facts["num_blocks"] * facts["block_bytes"]
    assert facts["num_slots"] == 8 + facts["num_snapshots"]


def test_what_does_not_fit_says_what_would(qnext):
    done = qnext("plan", "80b", "--gpu", "h100", *NEXT_80B)
    assert done.code == 1
    assert "does not fit: " in done.out
    assert "  fits: kv_cache_dtype=fp8, weights in fp8, experts int4" in done.out
    assert "  fits as asked on: h200, b200, mi300x" in done.out
    tight = qnext("plan", "80b", "--gpu", "h200", "--dtype", "fp8", "--concurrency", "8",
                  "--context", "400000", "--json")  # fmt: skip
    facts = json.loads(tight.out)
    assert (tight.code, facts["fits"]) == (1, False)
    found = re.match(r"a context of ([\d,]+) tokens", facts["suggestions"][0])
    context = int(found[1].replace(",", ""))
    for tokens, code in ((context, 0), (context + 1, 1)):
        again = qnext("plan", "80b", "--gpu", "h200", "--dtype", "fp8", "--concurrency", "8",
                      "--context", tokens)  # fmt: skip
        assert again.code == code
    assert "beyond the model's own 262,144 tokens" in again.out


def test_too_large_for_everything(qnext):
    done = qnext("plan", "235b", "--memory", "10GiB", "--context", "4096")
    assert done.code == 1
    assert "it needs a device with more memory" in done.out or "fits as asked on" in done.out


def test_one_byte_decides(qnext):
    args = ("plan", "qwen3-32b", "--context", "4096", "--json")
    need = json.loads(qnext(*args).out)["required_bytes"]
    assert json.loads(qnext(*args, "--memory", need).out)["fits"] is True
    assert qnext(*args, "--memory", need - 1).code == 1


def test_the_model_in_the_box_on_this_machine(qnext):
    facts = json.loads(qnext("plan", "--gpu", "cpu", "--concurrency", "2", "--json").out)
    assert facts["model"] == "qnext-small"
    assert facts["weights"] == "float32"
    assert facts["fits"]
    assert facts["bytes"]["mtp"] > 0
    assert "context" not in facts["bytes"] or facts["bytes"]["context"] == 0


def test_a_folder_and_a_bare_config(qnext, tiny_folder, tmp_path):
    facts = json.loads(qnext("plan", tiny_folder, "--memory", "1GiB", "--json").out)
    assert facts["weights"] == "bfloat16"
    assert facts["bytes"]["mtp"] > 0
    file = tmp_path / "tiny.json"
    file.write_text((tiny_folder / "config.json").read_text())
    bare = json.loads(qnext("plan", file, "--memory", "1GiB", "--json").out)
    assert bare["weight_bytes"] == facts["weight_bytes"]


def test_a_bare_config_of_qwen3_next_gets_mtp_for_drafts(qnext, tmp_path):
    data = preset("80b").to_hf_dict()
    del data["num_nextn_predict_layers"]
    file = tmp_path / "next.json"
    file.write_text(json.dumps(data))
    without = json.loads(qnext("plan", file, "--dtype", "fp8", "--json").out)
    drafts = json.loads(
        qnext("plan", file, "--dtype", "fp8", "--num-speculative-tokens", "2", "--json").out
    )
    assert "mtp" not in without["bytes"]
    assert drafts["bytes"]["mtp"] == 1_659_921_408
    assert drafts["bytes"]["verify"] == 3 * 1_188_864


@pytest.mark.parametrize(
    ("found", "weights"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "int4 (groups of 128)"),
        ({"quant_method": "awq", "group_size": 64}, "int4 (groups of 64)"),
        ({"quant_method": "compressed-tensors", "config_groups":
            {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}}}, "int4 (groups of 32)"),
    ],
)  # fmt: skip
def test_the_format_that_a_folder_names(qnext, tiny_folder, found, weights):
    file = tiny_folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": found}))
    facts = json.loads(qnext("plan", tiny_folder, "--memory", "1GiB", "--json").out)
    assert facts["weights"] == weights
    other = json.loads(
        qnext("plan", tiny_folder, "--memory", "1GiB", "--dtype", "bfloat16", "--json").out
    )
    assert other["weights"] == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("80b", "--gpu", "h300"), "GPU 'h300' is not known"),
        (("80b", "--gpu", "h100", "--memory", "4GB"), "both name a size"),
        (("80b", "--memory", "lots"), "is not a size"),
        (("80b", "--dtype", "int3"), "no format of weights"),
        (("80b", "--context", "0"), "max_model_len=0"),
        (("80b", "--kv-cache-dtype", "fp4"), "kv_cache_dtype='fp4'"),
        (("qwen3-32b", "--num-speculative-tokens", "1"), "needs MTP weights"),
    ],
)
def test_bad_questions(qnext, arguments, words):
    done = qnext("plan", *arguments)
    assert done.code == 2
    assert words in done.err
    assert "hint:" in done.err or "at least" in done.err


def test_a_damaged_config(qnext, tmp_path):
    file = tmp_path / "broken.json"
    file.write_text("[1")
    assert qnext("plan", file).code == 2
    file.write_text("[]")
    assert "no JSON object" in qnext("plan", file).err
