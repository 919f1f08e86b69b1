"""What a module sees as its parameter: a local view, computed when it is read.

A module's class is swapped for a subclass of the same name, in which the parameter's name is a
property over the registered parameter. The tree, the names and the layers' code stay as they are;
FSDP, optimizer and checkpoints work on the registered parameters. While FSDP has a parameter cut
over all ranks, it is shown as it is: only FSDP itself looks at it then.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

View = Callable[[Tensor], Tensor]


def show(module: nn.Module, views: dict[str, View]) -> None:
    """Let ``module`` read each named parameter through a function."""
    owner = type(module)
    members = {name: _property(name, view) for name, view in views.items()}
    module.__class__ = type(owner.__name__, (owner,), {"__module__": owner.__module__, **members})


def _property(name: str, view: View) -> property:
    return property(lambda self: view(self._parameters[name]))
