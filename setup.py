"""Package mapping; all metadata lies in pyproject.toml.

`kernels/` holds an importable package, `megavlm_kernels`, and is itself none: a folder `kernels` with an
`__init__.py` would be taken for the PyPI package of that name by libraries that probe for it.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(".", include=["megavlm", "megavlm.*"])
    + find_packages("kernels", include=["megavlm_kernels", "megavlm_kernels.*"]),
    package_dir={"megavlm": "megavlm", "megavlm_kernels": "kernels/megavlm_kernels"},
    package_data={
        "megavlm": [
            "py.typed",
            "export/*_files/*.jinja",
            "data/preview_files/*",
            "plan/page_files/*",
            "plan/calibration.yaml",
            "toy/bases/*.safetensors",
            "toy/bases/*.json",
        ],
        "megavlm_kernels": ["py.typed"],
    },
)
