"""Packaging of noisycond. The scripts at the root are run from a checkout and are not installed."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "noisycond" / "__init__.py").read_text(), re.M).group(1)

INSTALL_REQUIRES = [
    "torch>=2.9",
    "torchvision>=0.24",
    "diffusers>=0.36",
    "transformers>=5.0",
    "accelerate>=1.10",
    "datasets>=4.0",
    "huggingface-hub>=1.0",
    "safetensors>=0.6",
    "scikit-learn>=1.5",
    "scipy>=1.14",
    "matplotlib>=3.9",
    "numpy>=2.0",
    "pandas>=2.2",
    "opencv-python-headless>=4.10",
    "fsspec>=2025.3",
    "filelock>=3.16",
    "jinja2>=3.1",
    "pillow>=11.0",
    "psutil>=5.9",
    "pyyaml>=6.0",
    "tensorboard>=2.18",
    "torch-fidelity>=0.4.0",
    "tqdm>=4.66",
    "webdataset>=1.0",
]
EXTRAS = {
    "xformers": ["xformers"],
    "8bit": ["bitsandbytes"],
    "lora": ["peft>=0.18"],
    "deepspeed": ["deepspeed>=0.18"],
    "dev": ["pytest>=8.0", "pytest-xdist>=3.6", "ruff>=0.14", "peft>=0.18", "prdc>=0.2", "top-pr>=0.2.1"],
}

setup(
    name="noisycond",
    version=VERSION,
    description="Pre-train conditional diffusion models with slightly corrupted conditions, in Diffusers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["noisycond", "noisycond.*"]), "noisycond.pipelines"],
    # pipelines/ stands at the root of the checkout, where people look for it, and is installed below noisycond.
    package_dir={"noisycond.pipelines": "pipelines"},
    package_data={
        "noisycond": [
            "data/first_stages/*/*",
            "data/text_encoders/*/*",
            "evaluation/weights/*/*",
            "study/accelerate.yaml",
            "study/report.html.jinja",
        ]
    },
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
