# SPDX-License-Identifier: Apache-2.0
"""Folders of Hugging Face's `peft` as a format: adapters alone, on a model of ours.

In: adapters become a model folder that stands on `--base`; the base is not copied. Out:
a run's adapters without their base, whose name for its users is `--base_name`.
"""

import dataclasses
import pathlib

from nlhf_jax.checks import UserError
from nlhf_jax.conversion import peft
from nlhf_jax.conversion.formats import Format, Options
from nlhf_jax.conversion.shapes import flat, nested
from nlhf_jax.conversion.tensors import Adapters, Weights, of_array
from nlhf_jax.jobs import folders, our_weights


def recognises(path: pathlib.Path) -> bool:
    """Whether a path is a folder of adapters."""
    return (path / peft.CONFIG_FILE).is_file()


def open_folder(path: pathlib.Path, options: Options) -> Weights:
    """Returns the base's weights with the folder's adapters merged, as they are read.

    Args:
      path: of the two files that `peft` writes.
      options: "base", the model folder that the adapters stand on.

    Raises:
      UserError: no base is named, or the adapters are not its network's.
    """
    base = str(options.get("base", ""))
    if not base:
        raise UserError(
            f"the adapters of {str(path)!r} need the model that they stand on: --base "
            "must name its model folder (nlhf import makes one)"
        )
    weights = our_weights.open_folder(pathlib.Path(base), {})
    if weights.adapters is not None:
        raise UserError(
            f"--base must be a whole model, and {base!r} is adapters on another: merge "
            f"them with nlhf export --checkpoint={base} --format=nlhf --to=FOLDER"
        )
    lora, adapters = peft.read_adapter(path, weights.settings)
    tensors = {name: of_array(leaf) for name, leaf in flat(adapters).items()}
    merged = peft.merged(weights, lora, adapters)
    return dataclasses.replace(merged, adapters=Adapters(lora, base, tensors))


def write_folder(folder: pathlib.Path, weights: Weights, options: Options) -> None:
    """Writes the adapters alone.

    Args:
      folder: empty.
      weights: with adapters.
      options: "base_name", what their users load the base by; "" leaves it out.

    Raises:
      UserError: there are no adapters, or their base is itself adapters.
    """
    found = weights.adapters
    if found is None:
        raise UserError(
            "format peft holds adapters, and the checkpoint has none: it was trained "
            "without lora"
        )
    if weights.scoring is not None:
        raise UserError(
            f"format peft holds adapters of language models, got a "
            f"{weights.scoring.kind} model: export it merged, with --format=nlhf, "
            "hugging_face or t5x"
        )
    if folders.description_of(found.base).lora is not None:
        raise UserError(
            f"format peft holds adapters on a whole model, and {found.base!r}, their "
            "base, is adapters itself: export them merged, with --format=nlhf or "
            "hugging_face"
        )
    adapters = nested({name: tensor.read() for name, tensor in found.tensors.items()})
    name = str(options.get("base_name", ""))
    peft.write_adapter(folder, found.lora, adapters, weights.settings, name)


FORMAT = Format(
    looks_for=f"a folder with {peft.CONFIG_FILE}",
    recognises=recognises,
    open=open_folder,
    write=write_folder,
    open_flags={"base": "model folder that the adapters stand on"},
    write_flags={"base_name": "name of the base for those who load the adapters"},
)
