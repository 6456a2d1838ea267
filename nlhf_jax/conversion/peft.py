# SPDX-License-Identifier: Apache-2.0
"""Adapters in the folders that Hugging Face's `peft` writes, both ways; and merging.

    FOLDER/adapter_config.json          rank, alpha, names of modules
    FOLDER/adapter_model.safetensors    base_model.model.MODULE.lora_A.weight  [r, in]
                                        base_model.model.MODULE.lora_B.weight  [out, r]

MODULE is Hugging Face's name of a kernel's module in the base. Ours are the transposes.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nlhf_jax.checks import UserError, nearest
from nlhf_jax.conversion import safetensors_files
from nlhf_jax.conversion.hugging_face import their_name
from nlhf_jax.conversion.shapes import flat, nested, parameter_shapes
from nlhf_jax.conversion.tensors import Tensor, Weights, cast, of_array
from nlhf_jax.decoder_settings import DecoderOnlySettings, ModelSettings
from nlhf_jax.models.adapters import adapted_paths
from nlhf_jax.settings import LoraSettings

CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX, END = "base_model.model.", ".weight"
LEAVES = {"lora_a": "lora_A", "lora_b": "lora_B"}
# Every module that may be adapted, and the values that a switch of theirs may have
# because it then does nothing.
MODULES = ("query", "key", "value", "out", "wi", "wi_0", "wi_1", "wo")
NOTHING: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    # The others change the base's weights before training: adapters stand on those.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),
}
# Keys of any value: read elsewhere, said by the tensors, or of training alone.
NO_MATTER = (
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "target_modules",
    "exclude_modules",
    "layers_pattern",
    "lora_dropout",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "peft_version",
    "megatron_core",
    "qalora_group_size",
    "ensure_weight_tying",
)


def kernels(settings: ModelSettings) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns their module -> (our path to it, the kernel's shape) of a network."""
    shapes = parameter_shapes(settings)
    last = {path.split("/")[-2] for path in flat(shapes) if path.endswith("/kernel")}
    found = adapted_paths(shapes, [name for name in MODULES if name in last])
    named = {}
    for names, leaf in found.items():
        path = "/".join(names)
        module = their_name(f"{path}/kernel", settings).removesuffix(END)
        named[module] = path, tuple(leaf.shape)
    return named


def read_adapter(
    folder: str | pathlib.Path, settings: ModelSettings
) -> tuple[LoraSettings, dict[str, Any]]:
    """Returns the settings and the float32 adapters that `peft` wrote to a folder.

    Args:
      folder: with the two files of the module's picture.
      settings: the network that they are for.

    Raises:
      UserError: a file is missing or damaged, it is no plain LoRA, or a tensor is
        missing, not known, or of another shape than the network's; one is named.
    """
    folder = pathlib.Path(folder).expanduser()
    for name in (CONFIG_FILE, TENSORS_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{str(folder)!r} is no peft folder: it has no {name}")
    config = _config(folder / CONFIG_FILE)
    tensors = safetensors_files.tensors_of(folder / TENSORS_FILE)
    known = kernels(settings)
    leaves = {}
    for name, tensor in tensors.items():
        module, leaf = _parsed(name, known)
        path, shape = known[module]
        wanted = _their_shape(leaf, shape, config["r"])
        if tensor.shape != wanted:
            raise UserError(
                f"tensor {name} must have the shape {wanted}, of rank {config['r']} "
                f"and its module in the base, got {tensor.shape}"
            )
        leaves[f"{path}/{leaf}"] = tensor.read().astype(np.float32).T
    targets = tuple(dict.fromkeys(path.split("/")[-2] for path in sorted(leaves)))
    _check_all(leaves, known, targets)
    lora = LoraSettings(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        targets=targets,
        rank_stabilized=config.get("use_rslora", False),
    )
    return lora, nested(leaves)


def _config(file: pathlib.Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, rank, alpha = (config[k] for k in ("peft_type", "r", "lora_alpha"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} does not describe an adapter: {error}") from error
    if kind != "LORA":
        raise UserError(f"{file}: peft_type must be 'LORA', got {kind!r}")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise UserError(f"{file}: r and lora_alpha must be numbers, got {rank!r}")
    stabilized = config.get("use_rslora", False)
    if not isinstance(stabilized, bool):
        raise UserError(f"{file}: use_rslora must be a bool, got {stabilized!r}")
    for name, value in config.items():
        if not _does_nothing(name, value):
            raise UserError(
                f"{file}: {name} must be {json.dumps(NOTHING.get(name, (None,))[0])}, "
                f"got {json.dumps(value):.80}: no such adapter can be held here"
            )
    return config


def _does_nothing(name: str, value: Any) -> bool:
    """Whether an adapter with such a key is a plain LoRA."""
    # A layer's number may be 0, which equals False and is not empty.
    is_off = value is None or value is False or value in ("", [], {})
    return name in NO_MATTER or is_off or value in NOTHING.get(name, ())


def _parsed(name: str, known: Mapping[str, Any]) -> tuple[str, str]:
    """Returns (their module, our leaf) of a tensor's name."""
    for ours, theirs in LEAVES.items():
        end = f".{theirs}{END}"
        module = name.removeprefix(PREFIX).removesuffix(end)
        if name.startswith(PREFIX) and name.endswith(end) and module in known:
            return module, ours
    names = [f"{PREFIX}{m}.{end}{END}" for m in known for end in LEAVES.values()]
    raise UserError(
        f"tensor {name} has no place in this network's adapters{nearest(name, names)}"
    )


def _their_shape(leaf: str, kernel: tuple[int, ...], rank: int) -> tuple[int, ...]:
    inputs, outputs = kernel
    return (rank, inputs) if leaf == "lora_a" else (outputs, rank)


def _check_all(
    leaves: Mapping[str, Any],
    known: Mapping[str, tuple[str, tuple[int, ...]]],
    targets: Sequence[str],
) -> None:
    """Checks that every module of a target's name has both of its matrices."""
    for module, (path, _) in known.items():
        for ours, theirs in LEAVES.items():
            is_wanted = path.split("/")[-1] in targets
            if is_wanted and f"{path}/{ours}" not in leaves:
                raise UserError(f"tensor {PREFIX}{module}.{theirs}{END} is missing")
    if not leaves:
        raise UserError(f"{TENSORS_FILE} must hold adapters, got no tensor")


def write_adapter(
    folder: str | pathlib.Path,
    lora: LoraSettings,
    adapters: Mapping[str, Any],
    settings: ModelSettings,
    base: str = "",
) -> pathlib.Path:
    """Writes adapters as `peft` would, and returns the folder.

    Args:
      folder: an empty one, or one that is made.
      lora: the adapters' settings.
      adapters: nested dicts of arrays.
      settings: the network that they are for.
      base: name or folder of the base in Hugging Face's format, for their loaders.

    Raises:
      UserError: something is in the folder, it is a file or cannot be made, or the
        adapters are not this network's; then nothing is written.
    """
    folder = pathlib.Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} must be a folder to make, and is a file")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{str(folder)!r} exists already; name another folder")
    known, leaves, tensors = kernels(settings), flat(adapters), {}
    _check_all(leaves, known, lora.targets)
    modules = {path: module for module, (path, _) in known.items()}
    for path, array in leaves.items():
        place, _, leaf = path.rpartition("/")
        if place not in modules or leaf not in LEAVES:
            near = nearest(path, modules)
            raise UserError(f"adapter {path} has no place in this network{near}")
        array = np.asarray(array, np.float32).T
        wanted = _their_shape(leaf, known[modules[place]][1], lora.rank)
        if array.shape != wanted:
            raise UserError(
                f"adapter {path} must have the shape {wanted[::-1]}, got "
                f"{array.shape[::-1]}"
            )
        name = f"{PREFIX}{modules[place]}.{LEAVES[leaf]}{END}"
        tensors[name] = of_array(np.ascontiguousarray(array))
    used = sorted({name.split(".")[-3] for name in tensors})
    config = json.dumps(_their_config(lora, used, settings, base), indent=2)
    _write_whole(folder.resolve(), tensors, config)
    return folder


def _write_whole(
    folder: pathlib.Path, tensors: Mapping[str, Tensor], config: str
) -> None:
    """Writes both files, or after an error neither and no folder.

    Raises:
      UserError: the disk is full, or may not be written to.
    """
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        safetensors_files.write(partial / TENSORS_FILE, tensors, {"format": "pt"})
        (partial / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
        partial.rename(folder)  # which takes an empty folder's place
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{str(folder)!r} is not written: {error}") from error
        raise


def _their_config(
    lora: LoraSettings, modules: Sequence[str], settings: ModelSettings, base: str
) -> dict[str, Any]:
    is_decoder_only = isinstance(settings, DecoderOnlySettings)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_decoder_only else "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_stabilized,
        "target_modules": list(modules),
        "lora_dropout": 0.0,
        "inference_mode": True,
    } | {name: values[0] for name, values in NOTHING.items()}


def merged(
    weights: Weights, lora: LoraSettings, adapters: Mapping[str, Any]
) -> Weights:
    """Returns weights W + scale A B in float32, each computed when it is read.

    All are float32, also those without an adapter: whoever loads a file of two dtypes
    takes one of them, and bfloat16 would lose what small adapters add.

    Args:
      weights: of the base, by our paths.
      lora: the adapters' settings.
      adapters: nested dicts of arrays.

    Raises:
      UserError: an adapter has no kernel in the weights, or another's shape.
    """
    weights = cast(weights, "float32", allow_rounding=True)
    leaves, tensors = flat(adapters), dict(weights.tensors)
    for place in dict.fromkeys(path.rpartition("/")[0] for path in leaves):
        path = f"{place}/kernel"
        pair = tuple(np.asarray(leaves[f"{place}/{leaf}"]) for leaf in LEAVES)
        found = tensors.get(path)
        shape = (pair[0].shape[0], pair[1].shape[1])
        if found is None or tuple(found.shape) != shape:
            got = "none" if found is None else f"one of {tuple(found.shape)}"
            raise UserError(f"adapter {place} needs a {path} of {shape}, got {got}")
        read = functools.partial(_merge, found, *pair, lora.scale)
        tensors[path] = Tensor(found.shape, found.dtype, read)
    # An optimiser's state is of the numbers before.
    return dataclasses.replace(weights, tensors=tensors, moments=None)


def _merge(
    tensor: Tensor, lora_a: np.ndarray, lora_b: np.ndarray, scale: float
) -> np.ndarray:
    added = (lora_a.astype(np.float32) @ lora_b.astype(np.float32)) * scale
    return tensor.read() + added.astype(np.float32)
