# SPDX-License-Identifier: Apache-2.0
"""Packaging of nlhf_jax; `requirements.lock` holds the exact versions."""

import pathlib
import re
import shutil

import setuptools
from setuptools.command.build_py import build_py

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "([^"]+)"', (ROOT / "nlhf_jax" / "__init__.py").read_text()
)[1]

REQUIRED = [
    "absl-py",
    "etils[epath]>=1.9.1",
    "flax>=0.12.7",
    "gin-config>=0.5.0",
    "importlib_resources",  # tensorflow-datasets needs it and does not say so
    "jax>=0.10.0",
    "jaxtyping>=0.3.0",
    "jinja2>=3.1",
    "matplotlib>=3.9",
    "msgpack>=1.1",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.4",
    "rich>=14.0",
    "rouge-score>=0.1.2",
    "safetensors>=0.7",
    "scipy>=1.14",
    "sentencepiece>=0.2.1",
    "seqio>=0.0.20",
    "tensorboard>=2.20",
    "tensorstore>=0.1.75",
    "tensorflow>=2.21,<2.22",
    "tensorflow-datasets>=4.9.10",
    "tensorflow-text>=2.21,<2.22",
    "tokenizers>=0.22",
    "tqdm>=4.66",
    "xxhash>=3.5",
]
EXTRAS = {
    "tpu": ["jax[tpu]>=0.10.0"],
    "gpu": ["jax[cuda12]>=0.10.0"],
    "hf": ["gguf>=0.17", "peft>=0.17", "torch>=2.6", "transformers>=5"],
    "test": [
        "beartype>=0.22",
        "hypothesis>=6.100",
        "pytest>=9",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.14",
    ],
}


class BuildWithConfigs(build_py):
    """Puts a copy of the gin files into a wheel; an editable install reads ours."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = pathlib.Path(self.build_lib) / "nlhf_jax" / "configs"
            shutil.copytree(ROOT / "configs", target, dirs_exist_ok=True)


setuptools.setup(
    name="nlhf_jax",
    version=VERSION,
    description="Nash Learning from Human Feedback in JAX",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["nlhf_jax", "nlhf_jax.*"]),
    package_data={
        "nlhf_jax": ["evaluation/*.j2", "pretrained/*/*"],
    },
    cmdclass={"build_py": BuildWithConfigs},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["nlhf = nlhf_jax.__main__:start"]},
)
