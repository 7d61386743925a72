"""The package imported again in one process, after a purge of sys.modules or a reload: its operators stay."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from test_native import PACKAGE, run

from kfo_ext.ops import library

pytestmark = pytest.mark.skipif(not library.status()["cpu"][0], reason="the compiled CPU library is not built")


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the package in a folder of its own."""
    shutil.copytree(PACKAGE, tmp_path / "kfo_ext", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "kfo_ext"


AGAIN = """
import gc, importlib, torch

def use():
    from kfo_ext import KFO, Problems, transform
    from kfo_ext.functional import batch_norm_relu, conv2d
    R, G, L = (torch.arange(1.0, 5).view(1, 4).double().requires_grad_() for _ in range(3))
    Y = transform(R, G, L, Problems([(1, 2, 2)]))
    first = torch.autograd.grad((Y**2).sum(), (R, G, L), create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first), (R, G, L))
    norm = batch_norm_relu(G.view(1, 4, 1), R[:, :1], L[:, :1])
    image = conv2d(G.view(1, 1, 2, 2, 1), R.view(1, 1, 1, 2, 2))
    found = [Y, *first, *second, *torch.autograd.grad((norm.sum() ** 2 + image.sum() ** 2), (R, G, L))]
    return [tensor.detach() for tensor in found]

def purge():
    for name in [name for name in sys.modules if name.split(".")[0] == "kfo_ext"]:
        del sys.modules[name]
    gc.collect()
"""


def test_imported_again_after_a_purge_of_sys_modules(package):
    code = """
expected = use()
for _ in range(2):
    purge()
    for a, b in zip(use(), expected, strict=True):
        assert torch.equal(a, b)
importlib.reload(sys.modules["kfo_ext.ops.library"])
importlib.reload(sys.modules["kfo_ext.ops.transform.op"])
importlib.reload(sys.modules["kfo_ext.ops.conv2d.autograd"])
gc.collect()
assert all(map(torch.equal, use(), expected))
from kfo_ext import doctor
status = sys.modules["kfo_ext.ops.library"].status()
assert status["cpu"][0] and set(status) == {"reference", "cpu", "cuda"}, status
print("same")
"""
    done = run(AGAIN + code, package.parent)
    assert done.stdout == "same\n", done.stderr


def test_what_an_earlier_import_made_still_works(package):
    code = """
from kfo_ext import KFO
kfo = KFO([torch.ones(2, 3)])
expected = kfo.transform([torch.ones(2, 3)])
purge()
import kfo_ext
assert kfo_ext.KFO is not KFO
updates = kfo.transform([torch.ones(2, 3, requires_grad=True)])
assert torch.equal(updates[0], expected[0])
new = kfo_ext.KFO([torch.ones(2, 3)])
new.load_state_dict(kfo.state_dict())
loss = (new.transform([torch.ones(2, 3)])[0] ** 2).sum() + (updates[0] ** 2).sum()
loss.backward()
assert all(torch.equal(a.grad, b.grad) for a, b in zip(new.parameters(), kfo.parameters()))
print("same")
"""
    done = run(AGAIN + code, package.parent)
    assert done.stdout == "same\n", done.stderr


def test_another_copy_or_build_after_a_purge_is_refused(package):
    code = f"""
use()
purge()
sys.path.insert(0, {str(PACKAGE.parent)!r})
import kfo_ext.functional
"""
    done = run(AGAIN + code, package.parent)
    message = done.stderr.splitlines()[-1]
    assert message.startswith("ImportError: kfo_ext: a second copy of the package")
    assert str(PACKAGE / "_kfo_cpu.so") in message
    assert str(package / "_kfo_cpu.so") in message
    code = """
use()
from kfo_ext import _plan
from kfo_ext.ops.library import CPU_LIBRARY
rebuilt = CPU_LIBRARY.read_bytes().replace(_plan.build_id().encode(), b"0" * len(_plan.build_id()))
CPU_LIBRARY.unlink()
CPU_LIBRARY.write_bytes(rebuilt)
purge()
import kfo_ext.functional
"""
    message = run(AGAIN + code, package.parent).stderr.splitlines()[-1]
    assert message.startswith("ImportError: kfo_ext: build ")
    assert message.endswith("is of another build: restart Python")
