"""Packaging of gpt_tf.

The base install is small: the command line, tokenizers and NumPy, without
TensorFlow, as a device needs it. `train` adds TensorFlow and what belongs to it.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "gpt_tf/__init__.py").read_text("utf-8"), re.M
).group(1)

EDGE = ["ai-edge-litert>=2.3,<3", "flatbuffers>=24.3", "Jinja2>=3.1,<4"]
# A server of OpenAI's protocol.
SERVE = [
    *EDGE,
    "fastapi>=0.115,<1",
    "prometheus_client>=0.21,<1",
    "uvicorn>=0.34,<1",
]
# Google's own runtime, which the tests run the exported files in.
EDGE_TEST = [*EDGE, "litert-lm>=0.18.1,<0.19"]
TRAIN = [
    "tensorflow>=2.21,<2.22",
    "tf_keras>=2.21,<2.22",
    "tensorflow-model-optimization>=0.8.1,<0.9",
    # keras-nlp pins keras-hub without saying so of Python: 0.25 is the last for 3.10.
    'keras-nlp>=0.25.1,<0.26; python_version < "3.11"',
    'keras-nlp>=0.32,<0.33; python_version >= "3.11"',
    "h5py>=3.11,<4",
    "safetensors>=0.5,<1",
    "gguf>=0.17,<1",  # SmolLM2 and other files of llama.cpp
    "matplotlib>=3.8,<4",
    "adjustText>=1.3,<2",
    "scipy>=1.11,<2",  # compares a benchmark with its baseline
    "tensorboard>=2.21,<2.22",
    # What is trained is exported too, and run before it gets its name.
    *EDGE,
    "litert-lm-builder>=0.18.1,<0.19",
    # TF-MOT imports distutils without asking for it; from 3.12 it is setuptools'.
    'setuptools>=69; python_version >= "3.12"',
]
EXPLAIN = ["lime>=0.2,<0.3", "shap>=0.46,<1", "Jinja2>=3.1,<4"]
# EleutherAI's harness, which is not part of `all`: it brings data sets and pandas.
LM_EVAL = [*EDGE, "lm-eval>=0.4.13,<0.5"]
# Several workers, started again when one is lost.
CLUSTER = ["ray[train]>=2.60,<3"]
DOCS = [
    *EDGE,  # to put a model into the site
    "mkdocs>=1.6,<2",
    "mkdocs-material>=9.6,<10",
    "mkdocstrings[python]>=0.29,<2",
    "ruff>=0.9,<1",  # folds long signatures
]
NOTEBOOKS = [
    "jupytext>=1.16,<2",
    "nbclient>=0.10,<1",
    "ipykernel>=6.29,<8",
    "ipywidgets>=8,<9",
]


class BuildWithModel(build_py):
    """Put the models that come along into the package."""

    FILES = ("python-student.litertlm", "python-small.litertlm")
    FOLDER = "python-small"  # what the tutorials open

    def run(self):
        super().run()
        if self.editable_mode:  # it is found where it stands
            return
        kept, folder = (
            HERE / "saved_models",
            Path(self.build_lib) / "gpt_tf/saved_models",
        )
        (folder / self.FOLDER).mkdir(parents=True, exist_ok=True)
        paths = [kept / name for file in self.FILES for name in (file, f"{file}.json")]
        for path in (*paths, *(kept / self.FOLDER).iterdir()):
            self.copy_file(str(path), str(folder / path.relative_to(kept)))


setup(
    name="gpt-tf",
    version=VERSION,
    description="Train a GPT in Keras, make it fast, and ship it to an edge device.",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    cmdclass={"build_py": BuildWithModel},
    packages=find_packages(include=["gpt_tf", "gpt_tf.*"]),
    package_data={
        "gpt_tf.edge": ["web/*"],
        "gpt_tf.reporting": ["report.css", "templates/*.j2"],
    },
    python_requires=">=3.10,<3.13",
    install_requires=[
        "numpy>=1.26,<3",
        "tokenizers>=0.21,<1",
        "typer>=0.15,<1",
        "rich>=13.9,<16",
        "psutil>=6",  # wheels for devices, too, and nothing beside it
        # Newer versions of typer bring it too.
        "pydantic>=2.10,<3",
    ],
    extras_require={
        "train": TRAIN,
        "edge": EDGE,
        "edge-test": EDGE_TEST,
        "serve": SERVE,
        "cluster": CLUSTER,
        "explain": EXPLAIN,
        "lm-eval": LM_EVAL,
        "notebooks": NOTEBOOKS,
        "docs": DOCS,
        "bench": [
            "torch>=2.4",
            "onnx>=1.17,<2",
            "onnx-ir>=0.1,<2",
            "onnxruntime>=1.22,<2",
            "llama-cpp-python>=0.3.16,<0.4",
            *EDGE_TEST,
        ],
        "dev": [
            "pytest>=8.3,<10",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.115,<7",
            "ruff>=0.9,<1",
            "import-linter>=2.1,<3",
            "pre-commit>=4,<5",
            "openai>=1.60,<4",
            *CLUSTER,
            *EDGE_TEST,
            *SERVE,
            *EXPLAIN,
            *NOTEBOOKS,
        ],
        "all": [*TRAIN, *CLUSTER, *SERVE, *EXPLAIN, *NOTEBOOKS],
    },
    entry_points={"console_scripts": ["gpt-tf = gpt_tf.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
