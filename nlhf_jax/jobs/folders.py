# SPDX-License-Identifier: Apache-2.0
"""Model folders that describe themselves, so a checkpoint's path is all one needs.

MODEL_DIR/
  model.json         kind, shape, feature lengths, parent
  vocabulary.model   the SentencePiece model the parameters were trained with, or
  tokenizer.json     Hugging Face's, and what belongs to it: tokenizer_config.json,
                     special_tokens_map.json, generation_config.json,
                     chat_template.jinja
  config.gin         the operative configuration
  checkpoints/       one folder per step, or params.safetensors for an export
  metrics.jsonl      one line per logged step
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil

from nlhf_jax import checks, distributed
from nlhf_jax.checks import (
    UserError,
    check_choice,
    check_folder_name,
    check_integer,
)
from nlhf_jax.data.prompts import NO_TEMPLATE, OWN_IF_ANY, OWN_TEMPLATE
from nlhf_jax.data.special_tokens import COMPANIONS, TEMPLATE_FILE, template_source
from nlhf_jax.decoder_settings import DecoderOnlySettings, ModelSettings
from nlhf_jax.models.families import end_of
from nlhf_jax.settings import LoraSettings
from nlhf_jax.t5_settings import T5Settings

DESCRIPTION_FILE = "model.json"
VOCABULARY_FILE = "vocabulary.model"
TOKENIZER_FILE = "tokenizer.json"
BYTE_VOCABULARY = "byte"
PACKAGE = pathlib.Path(__file__).resolve().parent.parent
KINDS = ("language_model", "preference", "reward")
T5, DECODER_ONLY = "t5", "decoder_only"
# Name -> its settings, and which of their fields JSON has a list for.
FAMILIES = {
    T5: (T5Settings, "mlp_activations"),
    DECODER_ONLY: (DecoderOnlySettings, "attention_pattern"),
}
OF_ADAPTERS = ("lora", "base", "base_digest")  # what a whole model has none of
OF_PROMPTS = ("chat_template", "system_prompt")


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """What must be known to use the parameters of a folder.

    Attributes:
      kind: "language_model", "preference" or "reward".
      settings: shape of the network.
      feature_lengths: longest prompt ("inputs") and response ("targets") in tokens.
      vocabulary: name of the vocabulary's file in the folder, or "byte".
      lora: where the folder's parameters are adapters, which ones.
      base: then the parameters they stand on: a step's folder or a parameter file.
      base_digest: of what it held; see `jobs/adapters.py`.
      reference_digest: of the adapters of the reference it was trained against, where
        that has some: whoever goes on needs the same.
      chat_template: how prompts were put when it was trained: "" as they are, "model"
        in the template in its folder; None where nobody wrote that down.
      system_prompt: what the template said before them.
    """

    kind: str
    settings: ModelSettings
    feature_lengths: dict[str, int]
    vocabulary: str = VOCABULARY_FILE
    lora: LoraSettings | None = None
    base: str = ""
    base_digest: str = ""
    reference_digest: str = ""
    chat_template: str | None = None
    system_prompt: str = ""

    def to_json(self) -> str:
        """Returns the description as indented JSON."""
        fields = dataclasses.asdict(self)
        if isinstance(self.settings, DecoderOnlySettings):
            fields["family"] = DECODER_ONLY  # a file without it is a T5's
        if self.lora is None:
            fields = {k: v for k, v in fields.items() if k not in OF_ADAPTERS}
        if not self.reference_digest:
            del fields["reference_digest"]
        if self.chat_template is None:
            fields = {k: v for k, v in fields.items() if k not in OF_PROMPTS}
        return json.dumps(fields, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "ModelDescription":
        """Reads what `to_json` wrote."""
        fields = json.loads(text)
        family = check_choice("family", fields.pop("family", T5), FAMILIES)
        settings_class, sequence = FAMILIES[family]
        settings = fields["settings"]
        settings[sequence] = tuple(settings[sequence])
        put = fields.get("chat_template")
        if put not in (None, NO_TEMPLATE, OWN_TEMPLATE):
            raise UserError(f"chat_template must be '' or 'model', got {put!r}")
        said = fields.get("system_prompt", "")
        if not isinstance(said, str):
            raise UserError(f"system_prompt must be a text, got {said!r}")
        lora = fields.get("lora")
        if lora is not None:
            lora = LoraSettings(**lora | {"targets": tuple(lora["targets"])})
        return cls(**fields | {"settings": settings_class(**settings), "lora": lora})


def describe(
    model_dir: pathlib.Path,
    description: ModelDescription,
    vocabulary_path: str,
    chat_template: str | None = None,
    system_prompt: str = "",
) -> None:
    """Writes the description and copies the vocabulary; process 0 does, others wait.

    Args:
      model_dir: folder of the model.
      description: of it; which vocabulary it has is filled in.
      vocabulary_path: a vocabulary's file, copied with what belongs to it, or "byte".
      chat_template: as in `DataSettings`; a file becomes the folder's own template.
        None leaves what the description says.
      system_prompt: as in `DataSettings`.
    """
    distributed.first_does(
        "description",
        lambda: _write_description(
            model_dir, description, vocabulary_path, chat_template, system_prompt
        ),
    )


def _write_description(
    model_dir: pathlib.Path,
    description: ModelDescription,
    vocabulary_path: str,
    chat_template: str | None,
    system_prompt: str,
) -> None:
    model_dir.mkdir(parents=True, exist_ok=True)
    name = vocabulary_path
    if vocabulary_path != BYTE_VOCABULARY:
        source = pathlib.Path(vocabulary_path).expanduser()
        name = TOKENIZER_FILE if source.suffix == ".json" else VOCABULARY_FILE
        _copy(source, model_dir / name)
        for companion in COMPANIONS:
            if (source.parent / companion).is_file():
                _copy(source.parent / companion, model_dir / companion)
    if chat_template not in (None, NO_TEMPLATE, OWN_TEMPLATE, OWN_IF_ANY):
        _copy(pathlib.Path(chat_template).expanduser(), model_dir / TEMPLATE_FILE)
    description = dataclasses.replace(description, vocabulary=name)
    if chat_template is not None:
        description = dataclasses.replace(
            description,
            chat_template=_recorded(chat_template, model_dir, name),
            system_prompt=system_prompt,
        )
    (model_dir / DESCRIPTION_FILE).write_text(description.to_json())


def _recorded(chat_template: str, folder: pathlib.Path, vocabulary: str) -> str:
    """Returns what a description says of a template that may be a file or "auto"."""
    if chat_template == OWN_IF_ANY:
        return template_of(folder, vocabulary)
    return OWN_TEMPLATE if chat_template else NO_TEMPLATE


def template_of(folder: pathlib.Path, vocabulary: str) -> str:
    """Returns "model" where a folder holds a chat template for its vocabulary, or "".

    Raises:
      UserError: its files can't be read.
    """
    is_there = vocabulary == TOKENIZER_FILE and template_source(folder)
    return OWN_TEMPLATE if is_there else NO_TEMPLATE


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file that appears whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def expanded(name: str, path: str | pathlib.Path) -> pathlib.Path:
    """Returns a path whose `~` or `~user` is the home folder.

    Args:
      name: of the flag or setting, for a sentence.
      path: as the user wrote it.

    Raises:
      UserError: there is no such user.
    """
    return checks.expanded(name, path)


def plot_path(text: str) -> pathlib.Path:
    """Returns where a figure goes, to be asked before anything long has begun.

    Raises:
      UserError: the path is a folder, has no `.png` at its end, or lies in no folder.
    """
    target = expanded("plot", text)
    if target.suffix.lower() != ".png" or target.is_dir():
        raise UserError(f"plot must be a file that ends in .png, got {text!r}")
    if not target.parent.is_dir():
        raise UserError(f"plot: there is no folder {str(target.parent)!r}")
    return target


def resolve(checkpoint: str | pathlib.Path) -> pathlib.Path:
    """Returns the path, of what ships with the package where there is none here.

    So `nlhf_jax/pretrained/docstrings_t5` is found from every folder.

    Raises:
      UserError: it begins with the home folder of nobody.
    """
    path = expanded("checkpoint", checkpoint)
    shipped = PACKAGE.parent / path
    return shipped if not path.exists() and shipped.exists() else path


def newest_state(checkpoint: str | pathlib.Path) -> list[str | int]:
    """Returns which parameters a path leads to: the newest file of state and its time.

    What `train.write_sets` wrote is as new as the run it belongs to.

    Raises:
      UserError: as `find_model_dir`, or the folder holds no parameters.
    """
    folder = find_model_dir(checkpoint)
    run = folder.parent.parent if folder.parent.name == "sets" else folder
    steps = [f for f in (run / "checkpoints").glob("*") if f.name.isdecimal()]
    files = steps or [*run.glob("**/*.safetensors")]
    if not files:
        raise UserError(f"{str(checkpoint)!r} holds no checkpoint")
    newest = max(files, key=lambda file: (file.stat().st_mtime_ns, file.name))
    return [str(newest), newest.stat().st_mtime_ns]


def find_model_dir(checkpoint: str | pathlib.Path) -> pathlib.Path:
    """Returns the model folder of a path to it, its checkpoints or one of its steps.

    Raises:
      UserError: the path does not exist, or no folder of it holds a description.
    """
    path = resolve(checkpoint)
    if not path.exists():
        raise UserError(f"checkpoint folder {str(checkpoint)!r} does not exist")
    for folder in (path, path.parent, path.parent.parent):
        if (folder / DESCRIPTION_FILE).is_file():
            return folder
    raise UserError(
        f"{str(checkpoint)!r} is not a model folder: there is no {DESCRIPTION_FILE} "
        "in it or in the two folders above it"
    )


def _read(folder: pathlib.Path) -> ModelDescription:
    file = folder / DESCRIPTION_FILE
    try:
        found = ModelDescription.from_json(file.read_text(encoding="utf-8"))
        _check_description(found)
    except json.JSONDecodeError as error:
        reason = f"no JSON from line {error.lineno} on"
    except UnicodeDecodeError:
        reason = "no UTF-8"
    except (KeyError, TypeError, AttributeError, UserError) as error:
        reason = " ".join(map(str, error.args))
    except (OSError, RecursionError, ValueError) as error:
        reason = str(error)
    else:
        return found
    raise UserError(f"{file} is not a model description: {reason:.200}")


def _check_description(found: ModelDescription) -> None:
    check_choice("kind", found.kind, KINDS)
    for name in ("inputs", "targets"):
        check_integer(f"feature_lengths[{name!r}]", found.feature_lengths[name], 1)


def read_description(
    checkpoint: str | pathlib.Path, kind: str = "language_model"
) -> ModelDescription:
    """Returns the description of the folder that `checkpoint` lies in.

    Raises:
      UserError: no such folder, or it holds another kind of model than `kind`.
    """
    description = _read(find_model_dir(checkpoint))
    if description.kind != kind:
        raise UserError(
            f"checkpoint {str(checkpoint)!r} must hold a {kind} model, got a "
            f"{description.kind} model"
        )
    return description


def description_of(checkpoint: str | pathlib.Path) -> ModelDescription:
    """Returns the description of the folder that `checkpoint` lies in, of any kind.

    Raises:
      UserError: no such folder, or its description cannot be read.
    """
    return _read(find_model_dir(checkpoint))


def kind_of(checkpoint: str | pathlib.Path) -> str:
    """Returns the kind of model in the folder that `checkpoint` lies in.

    Raises:
      UserError: no such folder, or its description cannot be read.
    """
    return _read(find_model_dir(checkpoint)).kind


def vocabulary_file(checkpoint: str | pathlib.Path) -> str:
    """Returns the path of the vocabulary beside a checkpoint, or "byte".

    Raises:
      UserError: the folder has none.
    """
    folder = find_model_dir(checkpoint)
    name = check_folder_name("the vocabulary of a model", _read(folder).vocabulary)
    if name == BYTE_VOCABULARY:
        return name
    if not (folder / name).is_file():
        raise UserError(f"model folder {str(folder)!r} has no {name}")
    return str(folder / name)


def check_same_vocabulary(*checkpoints: str) -> None:
    """Checks that models which read each other's tokens have one vocabulary.

    Args:
      checkpoints: model folders; "" is left out.

    Raises:
      UserError: names the first two that differ.
    """
    first, theirs = "", ""
    for checkpoint in filter(None, checkpoints):
        file = vocabulary_file(checkpoint)
        if file != BYTE_VOCABULARY:
            file = hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()
            # One tokenizer serves models that end differently: to chat, or not.
            file += f" {end_of(_read(find_model_dir(checkpoint)).settings)}"
        if first and file != theirs:
            raise UserError(
                f"the {kind_of(checkpoint)} model {checkpoint!r} reads other tokens "
                f"than the {kind_of(first)} model {first!r}: their vocabularies differ"
            )
        first, theirs = first or checkpoint, file
