"""What pyproject.toml cannot say in a way that stays: the loops in C, which are optional (docs/design.md, `kernels/`)."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "ssprop_fx.kernels._kernels",
            sources=["ssprop_fx/kernels/kernels.c"],
            depends=[f"ssprop_fx/kernels/{name}.h" for name in ("loops", "direct", "products", "stem")],
            extra_compile_args=["-O3", "-fopenmp"],
            extra_link_args=["-fopenmp"],
            optional=True,  # without a compiler PyTorch's operations do the same
        )
    ]
)
