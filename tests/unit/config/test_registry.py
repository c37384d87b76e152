"""Names and what they stand for."""

import subprocess
import sys

import pytest

from online_dpo.config.registry import Registry, RegistryError, known_names, made_once, unknown_name

LATE = """
from online_dpo.config.registry import registries

def toy(name):
    [toys] = [one for one in registries() if one.kind == "toy"]
    return toys.decorator(name, repr)

@toy("late")
class A: ...
"""


def toys(*modules):
    registry = Registry("toy", dict(modules))

    def toy(name):
        return registry.decorator(name, lambda thing: thing)

    return registry, toy


def test_what_is_defined_again_replaces_itself():
    registry, toy = toys()

    def defined(value):
        @toy("one")
        def one():
            return value

    defined(1)
    defined(2)
    assert registry["one"]() == 2 and list(registry) == ["one"]
    with pytest.raises(
        RegistryError, match=r"a toy named `one` is there already, registered at .*test_registry.py:\d+"
    ):
        toy("one")(len)
    with pytest.raises(RegistryError, match=r"there is no toy named 'on'\. There is one\. Did you mean `one`\?"):
        registry["on"]
    registry.forget("one")
    with pytest.raises(RegistryError, match=r"there is no toy named 'one'\. None is registered\."):
        registry["one"]


def test_a_registry_is_the_collection_of_its_names_and_imports_a_module_when_asked_for_it(tmp_path, monkeypatch):
    registry, toy = toys(("late", "a_late_toy"), ("later", "a_later_toy"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a_late_toy.py").write_text(LATE)
    monkeypatch.delitem(sys.modules, "a_late_toy", raising=False)
    assert list(registry) == ["late", "later"] and len(registry) == 2 and "late" in registry and "never" not in registry
    assert "a_late_toy" not in sys.modules
    assert registry["late"] == repr(sys.modules["a_late_toy"].A)
    toy("mine")(sorted)
    assert list(registry) == ["late", "later", "mine"] and registry["mine"] is sorted


def test_a_late_name_is_taken_before_its_module_is_imported(tmp_path, monkeypatch):
    registry, toy = toys(("late", "a_second_late_toy"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "a_second_late_toy", raising=False)
    (tmp_path / "a_second_late_toy.py").write_text(LATE)
    with pytest.raises(RegistryError, match=r"`late` is there already, registered at .*a_second_late_toy.py:8"):
        toy("late")(sorted)


def test_fields_know_names_of_this_package_and_registered_ones():
    assert known_names("tie_policy", ("skip", "first")) == ("skip", "first")
    assert known_names("loss_type", ("sigmoid",))[0] == "sigmoid"
    assert unknown_name("nothing of the kind", "x") == "there is no nothing of the kind named 'x'. None is registered."


def test_a_class_is_made_once_and_anything_else_is_itself():
    class Thing: ...

    get = made_once(Thing)
    assert isinstance(get(), Thing) and get() is get()
    assert made_once(len)() is len


def test_it_loads_nothing():
    heavy = {"torch", "transformers", "online_dpo.methods"}
    code = f"import sys, online_dpo.config.registry; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_name_has_to_be_one(name):
    _, toy = toys()
    with pytest.raises(RegistryError, match=r"`@toy` needs a name: `@toy\('mine'\)`"):
        toy(name)(len)


def test_a_file_that_is_imported_under_two_names_registers_once(tmp_path):
    from importlib.util import module_from_spec, spec_from_file_location

    path = tmp_path / "plug.py"
    path.write_text(
        "from online_dpo.objective.losses import loss\n\n\n"
        "@loss('imported_twice')\ndef mine(pairs, options): return pairs.chosen_N\n"
    )
    from online_dpo.objective.losses import LOSSES

    for name in ("plug", "other_name"):
        spec = spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(module_from_spec(spec))
    assert "imported_twice" in LOSSES
    LOSSES.forget("imported_twice")
