"""Graph node → layer name, as the user knows it from ``named_modules()``.

Dynamo notes the modules that a node ran in by the identity of the module, and by a text relative to the frame that was
captured. Identity comes first: the module is looked up among the live modules and named from the outermost model that
holds it, so that a name does not depend on where a graph broke. The text serves when the module cannot be found.
"""

from __future__ import annotations

import functools
import gc
import re
import weakref
from collections.abc import Iterator

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ._compat import called_compiled, graph_argument, is_optimized_module
from .calls import functional_name
from .convolutions import ConvSpec, spec_of_module

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


class ModuleIndex:
    """The modules that are alive, and who holds whom. Built for each graph, and again when it turns out to be out of date."""

    def __init__(self) -> None:
        self._modules: dict[int, weakref.ref[nn.Module]] = {}
        self._parents: dict[int, list[weakref.ref[nn.Module]]] = {}
        self._names: weakref.WeakKeyDictionary[nn.Module, dict[int, str]] = weakref.WeakKeyDictionary()

    def find(self, key: str) -> nn.Module | None:
        """The live module whose ``id`` a key of ``nn_module_stack`` holds."""
        number = int(key.split("@")[0]) if key.split("@")[0].isdigit() else -1
        module = self._alive(number)
        if module is None:
            self.scan()
            module = self._alive(number)
        return module

    def root(self, module: nn.Module) -> nn.Module:
        """The model that a user would call ``named_modules()`` on: what was compiled, else the outermost holder.

        Of several compiled ones, or of several holders where none was compiled, the first that is found.
        """
        outermost: list[nn.Module] = []
        waiting, seen = [module], {id(module)}
        while waiting:
            current = waiting.pop()
            parents = self._holders_of(current)
            if any(is_optimized_module(p) and not self._holders_of(p) for p in parents):
                return unwrap(current)
            if not parents:
                outermost.append(current)
            further = [p for p in parents if id(p) not in seen]
            seen.update(map(id, further))
            waiting += reversed(further)
        return unwrap(next((m for m in outermost if called_compiled(m)), outermost[0] if outermost else module))

    def is_compiled(self, module: nn.Module) -> bool:
        """Whether a model was compiled as such: ``torch.compile(model)`` or ``model.compile()``."""
        return called_compiled(module) or self.compiled(module) is not None

    def compiled(self, module: nn.Module) -> nn.Module | None:
        """What ``torch.compile(module)`` returned, if it is alive."""
        return next((p for p in self._holders_of(module) if is_optimized_module(p)), None)

    def _holders_of(self, module: nn.Module) -> list[nn.Module]:
        return [p for ref in self._parents.get(id(module), ()) if (p := ref()) is not None]

    def holders(self, tensor: Tensor) -> list[tuple[nn.Module, str]]:
        """The live modules that hold a tensor as a parameter or buffer of their own, each with its name there."""
        found = self._holders(tensor)
        if not found:
            self.scan()
            found = self._holders(tensor)
        return found

    def name(self, module: nn.Module, root: nn.Module | None = None) -> str:
        """Full name of a live module in a root, without one in its own; the empty string for a root."""
        root = self.root(module) if root is None else root
        names = self._names.get(root)
        if names is None or id(module) not in names:
            names = {id(m): plain_name(n) for n, m in root.named_modules()}
            self._names[root] = names
        return names.get(id(module), "")

    def _alive(self, number: int) -> nn.Module | None:
        ref = self._modules.get(number)
        return ref() if ref is not None else None

    def _holders(self, tensor: Tensor) -> list[tuple[nn.Module, str]]:
        return [
            (module, name)
            for ref in self._modules.values()
            if (module := ref()) is not None
            for held in (vars(module).get("_parameters"), vars(module).get("_buffers"))
            for name, value in (held or {}).items()
            if value is tensor
        ]

    def scan(self) -> None:
        """Look at all live modules again."""
        self._modules.clear()
        self._parents.clear()
        self._names.clear()
        for candidate in gc.get_objects():
            if not issubclass(type(candidate), nn.Module):  # isinstance would run foreign __class__ properties
                continue
            held = vars(candidate).get("_modules")
            self._modules[id(candidate)] = weakref.ref(candidate)
            for child in (held or {}).values():
                if child is not None:
                    self._parents.setdefault(id(child), []).append(weakref.ref(candidate))


def unwrap(model: nn.Module) -> nn.Module:
    """The user's model inside compiled and data-parallel wrappers."""
    while True:
        if is_optimized_module(model):
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.get_submodule("module")
        elif "_fsdp_wrapped_module" in model._modules:
            model = model.get_submodule("_fsdp_wrapped_module")
        else:
            return model


def plain_name(name: str) -> str:
    """A module's name without the segments that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()``, named as in a graph: without the segments that wrappers add."""
    return ((plain_name(name), module) for name, module in model.named_modules())


def plain_text(text: str) -> str:
    """Dynamo's text for a module, ``L['self']._modules['layer1']…`` → ``layer1…``; the last resort."""
    text = re.sub(r"^[LG]\['[^']*'\]", "", text)
    text = text.replace(".__dict__['_modules']", "._modules")
    text = re.sub(r"\._(?:modules|parameters|buffers)\['([^']*)'\]", r".\1", text)
    text = re.sub(r"\[['\"]?([^'\"\]]*)['\"]?\]", r".\1", text)
    parts = [part for part in text.split(".") if part]
    if parts[:1] == ["module"]:
        parts = parts[1:]
    return plain_name(".".join(parts))


module_index = ModuleIndex()


class GraphNames:
    """Layer names for the nodes of one Dynamo graph.

    Args:
        graph_module: the graph as Dynamo made it. Its inputs tell whose forward was captured, which is the owner of calls
            for which Dynamo notes no module.

    Attributes:
        roots: the models that the graph's modules belong to, by identity.
        owners: layer name → the live module that makes the call.
    """

    def __init__(self, index: ModuleIndex | None = None, graph_module: GraphModule | None = None) -> None:
        self.index, self.graph_module = index or ModuleIndex(), graph_module
        self.roots: dict[int, nn.Module] = {}
        self.owners: dict[str, nn.Module] = {}
        self._counts: dict[tuple[str, str, str], int] = {}
        self._parts: dict[int, set[int]] = {}  # of modules, all modules in them; by identity, while the graph is worked on

    def __call__(self, node: Node, spec: ConvSpec) -> tuple[str, bool]:
        """(layer name, whether the call is a functional one) of a convolution node."""
        stack = list((node.meta.get("nn_module_stack") or {}).items())
        key, text, owner, is_layer, module = "", "", "", False, None
        while stack and self._in_no_model(stack[-1][0], others=len(stack) > 1):
            stack.pop()  # a convolution that lies in a list, say: a call of the module that has it
        if stack:
            key, (text, cls) = stack[-1]
            module = self.index.find(key)
            if module is not None:
                root = self._root(module, [key for key, _ in stack])
                owner = self.index.name(module, root)
                self.roots[id(root)] = root
                is_layer = spec_of_module(module, linear=spec.dim == 0) is spec
            else:
                owner = plain_text(text)
                is_layer = isinstance(cls, type) and issubclass(cls, spec.module)
        elif self._frame is not None:
            module = self._frame
            owner, root = self.index.name(module), self.index.root(module)
            self.roots[id(root)] = root
            is_layer = spec_of_module(module, linear=spec.dim == 0) is spec
        # one run of a module: Dynamo numbers the runs under each of its names, so that the key alone may be another run's
        nth = self._counts.get((key, text, spec.name), 0)
        self._counts[key, text, spec.name] = nth + 1
        own_call = is_layer and nth == 0
        layer = owner if own_call else functional_name(owner, spec.name, nth)
        if module is not None:
            self.owners[layer] = module
        return layer, not own_call

    def _root(self, module: nn.Module, keys: list[str]) -> nn.Module:
        """The model that a module ran in, which may be in several: that of the outermost module which ran and holds it."""
        for key in keys:
            outer = self.index.find(key)
            if outer is not None and outer is not module and id(module) in self._inside(outer):
                return self.index.root(outer)
        return self.index.root(module)

    def _inside(self, module: nn.Module) -> set[int]:
        if id(module) not in self._parts:
            self._parts[id(module)] = set(map(id, module.modules()))
        return self._parts[id(module)]

    def _in_no_model(self, key: str, others: bool) -> bool:
        """Whether a convolution module is no part of the model that calls it, of which ``others`` are in the stack."""
        module = self.index.find(key)
        if module is None or spec_of_module(module) is None or self.index.root(module) is not module:
            return False
        return others or self._frame not in (None, module)

    @functools.cached_property
    def _frame(self) -> nn.Module | None:
        """The module whose forward was captured: the one below which the graph's tensors lie where their sources say.

        Of a model and its transformed copy, which share them, the copy if there are operators of ours in the graph.
        """
        from .ops import conv
        from .transform import transformation_of

        ours = self.graph_module is not None and bool(self.graph_module.graph.find_nodes(op="call_function", target=conv))
        for node in self.graph_module.graph.find_nodes(op="placeholder") if self.graph_module is not None else ():
            source, tensor = graph_argument(node)
            # most call it self; of anything but a module a tensor is not an attribute of that kind
            source = re.sub(r"^L\['\w+'\](?=\._(parameters|modules|buffers)\b)", "L['self']", source)
            if tensor is None or not source.startswith("L['self']"):
                continue
            path = plain_text(source)
            found: dict[bool, nn.Module] = {}
            for holder, name in self.index.holders(tensor):
                full = f".{self.index.name(holder)}.{name}"
                if full.endswith(f".{path}"):
                    root = self.index.root(holder)
                    module = dict(plain_modules(root)).get(full.removesuffix(f".{path}").lstrip("."))
                    if module is not None:
                        found.setdefault(ours == (transformation_of(root) is not None), module)
            if found:
                return found.get(True, next(iter(found.values())))
        return None
