"""Package metadata. Tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

version = next(
    line.split('"')[1]
    for line in Path(__file__).with_name("megatron_vita").joinpath("__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

SERVE = ["fastapi", "uvicorn", "httpcore", "httpx", "prometheus_client", "llguidance"]

setup(
    name="megatron-vita",
    version=version,
    description="A 3D-parallel trainer for long-context vision-language models, built on megatron-core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_vita", "megatron_vita.*"]),
    package_data={"megatron_vita": ["**/*.yaml", "**/*.jinja", "**/*.cpp", "serving/page/*", "py.typed"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1,<0.20",  # tried: 0.16.1 (Python 3.10, 3.11) and 0.19.2 (3.12)
        "numpy>=1.26",
        "psutil",
        "pyyaml",
        "tqdm",
        "jinja2",
        "pillow>=10.1",
        "av>=15",  # since then it says which streams are pictures of the cover
        "pyarrow",
        "tokenizers>=0.20",
        "sentencepiece",
        "safetensors",
        "xxhash",
        "tensorboard",
        "zstandard",
    ],
    extras_require={
        "decord": ["decord"],  # preprocess_data.py --video-backend decord
        # transformer-engine compiles against the local torch and CUDA toolkit; 2.11 is what megatron-core 0.16 pins.
        "cuda": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12", "flash-attn"],
        "dev": [
            "decord; platform_system == 'Linux' and platform_machine == 'x86_64'",
            "pytest>=8",
            "pytest-xdist",
            "hypothesis",
            "ruff==0.17.6",
            "mypy>=1.15",
            "types-PyYAML",
            "types-tqdm",
            "types-psutil",
            "transformers>=5.0",
            "scikit-learn",
            "matplotlib",
            "scipy",
            "ray>=2.40",
            *SERVE,
            "openai>=1.50",
            "playwright",  # its driver only; the browser is the system's (tests/serving/browser.py)
        ],
        "evaluate": ["matplotlib"],  # plots of tools/evaluate.py
        "quickstart": ["transformers>=5.0", "scikit-learn", "matplotlib", "scipy"],
        "ray": ["ray>=2.40"],  # preprocess_data.py --engine ray
        "serve": SERVE,  # tools/serve.py
    },
)
