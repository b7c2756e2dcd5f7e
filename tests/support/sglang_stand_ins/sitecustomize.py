"""Stand-ins for the packages of SGLang that need a driver or are gigabytes, for CI on machines without a card.

With this folder on PYTHONPATH, `import flashinfer` and the others give modules whose every name is a class that takes
anything and does nothing. They say "present", as a full install is; on a user's machine the real packages answer.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
import types

PACKAGES = frozenset(
    {
        *("sgl_kernel", "flashinfer", "deep_gemm", "deep_ep", "flash_attn", "flash_mla", "cutlass", "quack"),
        *(
            "tilelang",
            "triton_kernels",
            "helion",
            "humming",
            "bitsandbytes",
            "torch_memory_saver",
        ),  # these need a driver
        *("xgrammar", "outlines", "llguidance", "IPython", "datasets"),  # these are large, and not called
    }
)
VERSIONS = {
    "flashinfer-python",
    "flashinfer_python",
    "sglang-kernel",
    "sgl-kernel",
    "sgl_kernel",
    "helion",
    "sgl-deep-gemm",
    "quack-kernels",
}


class OfAnything(type):
    """The class of stand-in classes: every name of such a class is another one."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = OfAnything(name, (Anything,), {"__module__": cls.__module__})
        setattr(cls, name, value)
        return value

    def __or__(cls, _):
        return cls

    __ror__ = __or__


class Anything(metaclass=OfAnything):
    """Takes anything, gives itself back, is a base class, a decorator and a context."""

    def __init__(self, *args, **kwargs):
        pass

    def __init_subclass__(cls, **kwargs):
        pass

    @classmethod
    def __get_pydantic_core_schema__(cls, *_):
        from pydantic_core import core_schema

        return core_schema.any_schema()

    def __class_getitem__(cls, item):
        return cls

    def __call__(self, *args, **kwargs):
        if len(args) == 1 and not kwargs and callable(args[0]):
            return args[0]
        return Anything()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()

    def __iter__(self):
        return iter(())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def __getitem__(self, _):
        return Anything()

    def __or__(self, _):
        return self

    __ror__ = __or__


class Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = special(self.__name__, name)
        if value is None:
            value = OfAnything(name, (Anything,), {"__module__": self.__name__})
        setattr(self, name, value)
        return value


class _Scalars:
    """Distinct objects by name: `quant_type in supported` decides for Marlin."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        value = Anything()
        value.name = name
        value.size_bits = int("".join(filter(str.isdigit, name.partition("b")[0].partition("_")[0])) or 4)
        setattr(self, name, value)
        return value


def special(module, name):
    if name == "scalar_types":
        return _Scalars()
    if name == "get_num_sms":
        return lambda: 132
    return None


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in PACKAGES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = Module(spec.name)
        module.__path__ = []
        module.__version__ = "999.0"
        module.__file__ = f"/stand-in/{spec.name.replace('.', '/')}/__init__.py"
        return module

    def exec_module(self, module):
        pass


_version = importlib.metadata.version


def version(name):
    try:
        return _version(name)
    except importlib.metadata.PackageNotFoundError:
        if name in VERSIONS or name.partition("-")[0] in PACKAGES:
            return pinned(name)
        raise


def pinned(name):
    """The version that SGLang's own metadata asks for."""
    import re

    for need in importlib.metadata.requires("sglang") or ():
        wanted = re.match(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?==([^;\s]+)", need)
        if wanted and wanted.group(1).replace("_", "-").lower() == name.replace("_", "-").lower():
            return wanted.group(2)
    return "999.0"


importlib.metadata.version = version
sys.meta_path.append(Finder())
