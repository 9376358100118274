"""Which kernel runs a call: by card, Triton, arguments and ``kernel_name``; the operator and the report agree.

The Hopper kernel and the card are stand-ins here, so that every branch is seen on any machine.
"""

import sys
from types import ModuleType

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fg_inductor
from fg_inductor import kernels
from fg_inductor.kernels import choice, ops
from fg_inductor.kernels.mask import word_count
from fg_inductor.testing import make_qkv
from fg_inductor.testing_passes import SMALL
from fg_inductor.toy_models import Stack, tokens

NAME = "attention_forward_hopper"


@pytest.fixture(autouse=True)
def fresh():
    """What was found out about a card that a test made up is forgotten."""
    choice._hopper.cache_clear()
    yield
    choice._hopper.cache_clear()


@pytest.fixture
def install(monkeypatch):
    """Puts a module in the Hopper kernel's place; None where importing it fails."""

    def put(module):
        monkeypatch.delattr(kernels, NAME, raising=False)
        monkeypatch.setitem(sys.modules, f"fg_inductor.kernels.{NAME}", module)

    return put


@pytest.fixture
def card(monkeypatch):
    """Makes the devices have a compute capability."""

    def make(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")

    return make


def hopper(refusal=None, launch=None):
    module = ModuleType(NAME)
    module.refusal = lambda *arguments: refusal
    module.launch = launch
    return module


@pytest.fixture
def call():
    """Arguments of ``ops.attention_kernel`` up to ``kernel_name``: fake, on CUDA, made before a card is made up."""
    return arguments("cuda")


def arguments(device):
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 2, 64, 64, dtype=torch.bfloat16, device=device) for _ in range(3))
        mask = torch.empty(1, 2, 1, word_count(64, 8), dtype=torch.int32, device=device)
    return q, k, v, mask, None, None, 0.125, 64, 8, "none", 0


CHOICES = {
    # kernel, capability, what refusal() says, what is chosen
    "hopper": ("auto", (9, 0), None, "hopper"),
    "hopper-forced": ("hopper", (9, 0), None, "hopper"),
    "refused": ("auto", (9, 0), "head dim 256.", "portable"),
    "portable-forced": ("portable", (9, 0), None, "portable"),
    "ampere": ("auto", (8, 0), None, "portable"),
    "blackwell": ("auto", (10, 0), None, "portable"),
    "no-card": ("auto", None, None, "portable"),
}


@pytest.mark.parametrize("kernel, capability, refusal, chosen", CHOICES.values(), ids=CHOICES)
def test_choice(kernel, capability, refusal, chosen, call, card, install):
    card(capability)
    install(hopper(refusal))
    assert ops.attention_kernel(*call, kernel) == chosen


def test_auto_is_portable_where_triton_lacks_gluon(call, card, install):
    card((9, 0))
    install(None)
    assert ops.attention_kernel(*call, "auto") == "portable"


ERRORS = {
    "refused": ((9, 0), hopper("head dim 256 has no tile."), r"head dim 256 has no tile; pass kernel_name='auto'"),
    "ampere": ((8, 6), hopper(), r"Card has compute capability 8\.6, not 9\.0; pass"),
    "no-card": (None, hopper(), "there is no NVIDIA GPU here; pass"),
    "no-gluon": ((9, 0), None, r"the installed Triton lacks what it needs of Gluon \(.*attention_forward_hopper"),
}


@pytest.mark.parametrize("capability, module, message", ERRORS.values(), ids=ERRORS)
def test_forced_hopper_raises(capability, module, message, call, card, install):
    card(capability)
    install(module)
    with pytest.raises(ValueError, match=f"fgattn::attention: the hopper kernel can't run this call: .*{message}"):
        ops.attention_kernel(*call, "hopper")


def test_card_is_asked_once_and_not_for_portable(call, card, install, monkeypatch):
    card((9, 0))
    install(hopper())
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or (9, 0))
    ops.attention_kernel(*call, "portable")
    assert asked == []
    for _ in range(3):
        ops.attention_kernel(*call, "auto")
    assert asked == [torch.device("cuda:0")]


BACKWARD = {
    # kernel of the forward pass, capability, what refusal() says, what is chosen
    "hopper": ("auto", (9, 0), None, "hopper"),
    "portable-forced": ("portable", (9, 0), None, "portable"),
    "refused": ("auto", (9, 0), "slices of 16", "portable"),
    "refused-after-hopper": ("hopper", (9, 0), "slices of 16", "portable"),
    "ampere": ("auto", (8, 0), None, "portable"),
}


@pytest.mark.parametrize("kernel, capability, refusal, chosen", BACKWARD.values(), ids=BACKWARD)
def test_choice_for_backward(kernel, capability, refusal, chosen, call, card, monkeypatch):
    card(capability)
    monkeypatch.delattr(kernels, "attention_backward_hopper", raising=False)
    monkeypatch.setitem(sys.modules, "fg_inductor.kernels.attention_backward_hopper", hopper(refusal))
    assert choice.choose_backward(kernel, call[0], 0.125, 64) == chosen


@pytest.mark.parametrize("kernel", ["auto", "portable"])
def test_backward_hears_of_the_kernel(kernel, monkeypatch):
    """What the user forced holds for the backward pass, whose operator is told by name or by place."""
    seen = []
    monkeypatch.setattr(ops.reference, "attention", lambda q, *rest: (q.clone(), q.sum(-1)))
    monkeypatch.setattr(choice, "choose", lambda kernel, *arguments: "reference")

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.fgattn.attention_backward.default:
                seen.append(dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | (kwargs or {}))
            return func(*args, **(kwargs or {}))

    q = torch.randn(1, 2, 64, 64, requires_grad=True)
    mask = torch.zeros(1, 2, 1, word_count(64, 8), dtype=torch.int32)
    with Watch():
        ops.attention(q, q, q, mask, None, None, 0.125, 64, 8, "none", 0, kernel)[0].sum().backward()
    (arguments,) = seen
    assert arguments.get("kernel_name", "auto") == kernel


def test_asks_about_what_launch_will_get(monkeypatch):
    """Tensors whose last dimension is contiguous, and no ``min_seq``."""
    seen = []
    monkeypatch.setattr(choice, "choose", lambda *a: seen.append(a) or "portable")
    q, k, *rest = arguments("cpu")
    ops.attention_kernel(q.mT.contiguous().mT, k, *rest, "hopper")
    ((kernel, first, second, *others),) = seen
    assert kernel == "hopper" and first.stride() == q.stride() and second is k and others == rest[:-1]


def test_operator_launches_the_choice(install, monkeypatch):
    results = torch.ones(1, 2, 64, 64), torch.zeros(1, 2, 64)
    launched = []
    install(hopper(launch=lambda *arguments: launched.append(arguments) or results))
    monkeypatch.setattr(choice, "choose", lambda kernel, *arguments: kernel)
    q = torch.zeros(1, 2, 64, 64)
    mask = torch.zeros(1, 2, 1, word_count(64, 8), dtype=torch.int32)
    out, _ = ops.attention(q, q, q, mask, None, None, 0.125, 64, 8, "none", 0, "hopper")
    assert torch.equal(out, results[0]) and launched[0][4:] == (None, None, 0.125, 64, 8, "none")


# The report


def compiled(model, **options):
    options = {f"fgattn.{name}": x for name, x in {**SMALL, "inner": "eager", **options}.items()}
    return torch.compile(model, backend="fgattn", options=options)


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
def test_report_asks_with_what_the_operator_gets(symbolic, install, monkeypatch):
    """The dtype that autocast casts to, sizes as plain ints, the setting; and the answer is the row's kernel."""

    def model(x):  # float32 up to the site
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    x, _, _ = make_qkv(heads=3, layout="bshd")
    if symbolic:
        torch._dynamo.mark_dynamic(x, 2)
    asked = []
    monkeypatch.setattr(choice, "choose", lambda *a: asked.append(a) or "hopper")
    install(hopper(launch=ops.reference.attention))
    with torch.autocast("cpu", torch.bfloat16):
        compiled(model, kernel="portable")(x)
    assert [row.kernel for row in fg_inductor.report()] == ["hopper"] and len(asked) == 2
    traced, called = asked
    assert traced[0] == called[0] == "portable" and traced[1].dtype == torch.bfloat16
    for x, y in zip(traced[1:5], called[1:5], strict=True):
        assert (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride())
        assert all(type(size) is int for size in (*x.shape, *x.stride()))
    assert traced[5:] == called[5:]


@pytest.mark.parametrize("kernel", ["portable", "hopper"])
def test_forced_kernel_that_cannot_run_stops_the_compilation(kernel):
    with pytest.raises(BackendCompilerFailed, match=f"the {kernel} kernel can't run this call: q is on cpu"):
        compiled(Stack(), kernel=kernel)(tokens())
