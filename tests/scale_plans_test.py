# SPDX-License-Identifier: Apache-2.0
"""Plans against the compiler, on the configurations for which 10 % is promised."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from nlhf_jax.scale import words

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHAPE = """
T5Settings.vocab_size = {vocabulary}
T5Settings.emb_dim = {width}
T5Settings.num_heads = {heads}
T5Settings.head_dim = 64
T5Settings.mlp_dim = {hidden}
T5Settings.num_encoder_layers = {layers}
T5Settings.num_decoder_layers = {layers}
T5Settings.dtype = '{dtype}'
T5Settings.mlp_activations = ('gelu', 'linear')
"""
DECODER = """
DecoderOnlySettings.vocab_size = {vocabulary}
DecoderOnlySettings.emb_dim = {width}
DecoderOnlySettings.num_heads = {heads}
DecoderOnlySettings.num_kv_heads = 2
DecoderOnlySettings.head_dim = 64
DecoderOnlySettings.mlp_dim = {hidden}
DecoderOnlySettings.num_layers = {layers}
DecoderOnlySettings.dtype = '{dtype}'
"""
SMALL = {"vocabulary": 8192, "width": 256, "layers": 2, "dtype": "float32"}
SCANNED = ["--gin.REMAT='full'", "--gin.SCAN_LAYERS=True", "--gin.NUM_VOCAB_CHUNKS=4"]
WHOLE = ["--gin.REMAT='none'", "--gin.SCAN_LAYERS=False", "--gin.NUM_VOCAB_CHUNKS=1"]


def arguments(
    folder: pathlib.Path, job: str, shape: dict, size: tuple, text: str = SHAPE
) -> list[str]:
    """Returns the words of a job with a shape and (prompt, response, batch)."""
    prompt, response, batch = size
    heads, hidden = shape["width"] // 64, shape["width"] * 11 // 4
    file = folder / "shape.gin"
    file.write_text(text.format(**shape, heads=heads, hidden=hidden))
    if job == "train":
        found = ["--job=train", "--gin_file=configs/algorithms/nash_md_pg.gin"]
        found += [f"--reference_model={file}", f"--preference_model={file}"]
        found += [f"--gin.MAX_DECODE_LENGTH={response}"]
    else:
        found = [f"--job={job}", f"--gin_file=configs/runs/{job}.gin"]
        found += [f"--model={file}"]
    found += [f"--gin.BATCH_SIZE={batch}"]
    lengths = {"inputs": prompt, "targets": response}
    found += [f"--gin.TASK_FEATURE_LENGTHS={lengths}"]
    return found + ["--gin.TRAIN_FILE=a.jsonl"] * (job in ("preference", "reward"))


def total(*given: str) -> float:
    """Returns the bytes of a device, in a process of its own: devices are fixed."""
    words_ = ["compile", *given]
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "nlhf_jax", *words_, "--json"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "NPROC": "16"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)["memory"]["total"]


@pytest.mark.battery
@pytest.mark.parametrize(
    ("job", "flags"),
    [
        ("sft", ["--gin.FSDP=4", *SCANNED]),
        ("preference", ["--gin.FSDP=8", *SCANNED[:2], WHOLE[2]]),
    ],
)
def test_plans_on_eight_fake_devices(job, flags, tmp_path):
    given = arguments(tmp_path, job, SMALL, (128, 64, 64)) + flags
    planned = total(*given, "--cpu_devices=8", "--plan")
    compiled = total(*given, "--cpu_devices=8")
    assert planned == pytest.approx(compiled, rel=0.1)


@pytest.mark.battery
@pytest.mark.parametrize("text", [SHAPE, DECODER], ids=["t5", "decoder_only"])
def test_plans_of_policy_optimisation(text, tmp_path):
    """The whole step, rollout and score and update, with layers in a loop."""
    given = arguments(tmp_path, "train", SMALL, (128, 64, 64), text)
    given += ["--gin.FSDP=8", *SCANNED, "--cpu_devices=8"]
    assert total(*given, "--plan") == pytest.approx(total(*given), rel=0.1)


def test_a_plan_says_that_it_is_one():
    memory = {"total": 20, "usable": 10, "parts": {"parameters": 6}}
    found = {"memory": memory, "fits": True, "planned": True, "mesh": {"fsdp": 1}}
    assert words.verdict(found).startswith("by estimate, fits: 20 B")
    refused = words.verdict(found | {"fits": False})
    assert refused.startswith("by estimate, does not fit: 20 B")
    assert "by estimate" not in words.verdict(found | {"planned": False})
    assert "%" in words.PLAN_ERROR
