"""What training code does around a compiled model: optimizers, frozen weights, adapters, compiled autograd, torch.func.

At density 1.0 all of it must give the gradients of eager, dense attention. Checkpoints and their policies have a file
of their own, test_training_compiled.py; several processes have test_training_distributed.py.
"""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import fg_inductor
from fg_inductor.testing import assert_l2_as_accurate
from fg_inductor.toy_models import (
    SHORT,
    Stack,
    assert_as_accurate_as_eager,
    count_calls,
    gradients,
    tiny_wan,
    tokens,
    wan_inputs,
)

DENSE = {**SHORT, "fgattn.inner": "aot_eager", "fgattn.density": 1.0}
SPARSE = {**DENSE, "fgattn.density": 0.3}


def compiled(model, options=DENSE, **how):
    return torch.compile(model, backend="fgattn", options=options, **how)


# Optimizers


def train(model, run, batches, accumulate):
    """The losses of SGD, ``accumulate`` batches a step, and the weights after it."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=5, momentum=0.9), []
    for i, batch in enumerate(batches, 1):
        loss = (run(batch) - batch).square().mean() / accumulate
        loss.backward()
        losses.append(loss.detach())
        if i % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=i % 4 == 0)
    return torch.stack(losses), torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_and_weights_follow_dense_training(accumulate):
    """The gradients of several backward passes add up, and weights that change are not baked into the graph."""
    models = [Stack() for _ in range(3)]
    models[1].load_state_dict(models[0].state_dict())
    models[2].double().load_state_dict(models[0].state_dict())
    start, batches = torch.cat([p.detach().flatten() for p in models[0].parameters()]), [tokens() for _ in range(6)]
    actual = train(models[0], compiled(models[0], fullgraph=True), batches, accumulate)
    plain = train(models[1], models[1], batches, accumulate)
    exact = train(models[2], models[2], [x.double() for x in batches], accumulate)
    assert (exact[1] - start).norm() > 0.01 * start.norm(), "the weights have hardly changed"
    for name, *results in zip(("losses", "weights"), actual, plain, exact, strict=True):
        assert_l2_as_accurate(*results, label=name)
    assert fg_inductor.report().rewritten == 2
    assert counters["stats"]["unique_graphs"] == 1


def test_two_forwards_before_their_backwards():
    """What forward keeps for backward belongs to the call: another call in between does not touch it."""
    model, one, two = Stack(), tokens(), tokens()
    run = compiled(model, SPARSE, fullgraph=True)

    def grads(losses):
        return torch.autograd.grad(sum(losses), list(model.parameters()))

    together = grads([run(x).square().mean() for x in (one, two)])
    apart = [grads([run(x).square().mean()]) for x in (one, two)]
    for both, first, second in zip(together, *apart, strict=True):
        torch.testing.assert_close(both, first + second)
    assert fg_inductor.report().rewritten == 2


# Frozen weights: the gradients that nobody wants are not computed


class Wanted(TorchDispatchMode):
    """What each call of the backward operator inside the ``with`` is asked for, as text: "qkv", "q", ..."""

    def __init__(self):
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fgattn.attention_backward.default:
            wanted = args[14] if len(args) > 14 else (True,) * 3  # the dispatcher leaves out a default
            self.calls.append("".join(name for name, want in zip("qkv", wanted, strict=True) if want))
        return func(*args, **(kwargs or {}))


def wanted(loss):
    with Wanted() as seen:
        loss.backward()
    return seen.calls


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("trained", ["q", "k", "v", "qv", "qk", "out", "none"])
def test_frozen_projections(trained, inner):
    names = {"out": ["to_out"], "none": []}.get(trained, [f"to_{x}" for x in trained])
    model = Stack(1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[2] in names)
    options, x = {**DENSE, "fgattn.inner": inner}, tokens(requires_grad=not names)
    # Where nothing is trained the loss depends on x all the same, by a way around attention.
    loss = (compiled(model, options, fullgraph=True)(x.detach()) + x).square().mean()
    assert wanted(loss) == ([] if trained in ("out", "none") else [trained])
    assert fg_inductor.report().rewritten == 1
    actual = [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    double = copy.deepcopy(model).double()
    (model(x.detach()) + x).square().mean().backward()
    (double(x.detach().double()) + x.double()).square().mean().backward()
    results = (actual, *([p.grad for p in m.parameters() if p.requires_grad] for m in (model, double)))
    for one, other, third in zip(*results, strict=True):
        assert_l2_as_accurate(one, other, third)


# Projections with an adapter -> what backward is asked for in the first of two layers. In the second, x wants one.
ADAPTERS = {("to_q", "to_out.0"): "q", ("to_v",): "v"}


@pytest.mark.parametrize("targets", ADAPTERS, ids="-".join)
def test_lora(targets):
    """peft's adapters are trained alone, and attention stays self attention to the pass."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_wan(), peft.LoraConfig(r=4, target_modules=list(targets)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, and lora_A without gradient then
            torch.nn.init.normal_(parameter, std=0.1)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    run, inputs = compiled(model), wan_inputs()
    calls = wanted(run(**inputs)[0].square().mean())
    assert sorted(set(calls)) == sorted({"qkv", ADAPTERS[targets]}), calls
    report = fg_inductor.report()
    assert (report.rewritten, [row.site.kind for row in report if row.site.rewritten]) == (2, ["self"] * 2)
    assert_as_accurate_as_eager(model, run, inputs)


# What diffusers and torch offer for training


def test_gradient_checkpointing_of_diffusers():
    """Each block is recomputed in backward, attention with it, and the gradients stay."""
    model, inputs = tiny_wan(), wan_inputs()
    model.enable_gradient_checkpointing()
    model.train()
    run = compiled(model, fullgraph=True)
    assert_as_accurate_as_eager(model, run, inputs)
    calls = count_calls(lambda: gradients(model, run, inputs))
    order = {name: calls[name] for name in ("query_order", "reorder")}
    assert calls == order | {"select_pooled": 4, "attention": 4, "attention_backward": 2}
    assert fg_inductor.report().rewritten == 2


@pytest.mark.parametrize("enabled", [False, True], ids=["off", "on"])
def test_compiled_autograd(enabled):
    """A step whose backward is compiled too, or, by default, runs between graphs."""
    model = Stack()

    def step(x):
        out = model(x)
        out.square().mean().backward()
        return out.detach()

    def results(run, model, x):
        model.zero_grad()
        return [run(x), *(p.grad.clone() for p in model.parameters())]

    x = tokens()
    with torch._dynamo.config.patch(compiled_autograd=enabled):
        actual = results(compiled(step), model, x)
    assert counters["compiled_autograd"]["captures"] == enabled
    assert fg_inductor.report().rewritten == 2
    plain = results(step, model, x)
    exact = results(step, model.double(), x.double())
    for one, other, third in zip(actual, plain, exact, strict=True):
        assert_l2_as_accurate(one, other, third)


def functional_loss(parameters, model, x):
    return torch.func.functional_call(model, parameters, (x,)).square().mean()


@pytest.mark.parametrize("how", ["transform-of-compiled", "compiled-transform"])
def test_torch_func_stays_dense(how):
    """Dynamo does not compile a model under a transform; where the graph holds the transform the report says why."""
    model, x = Stack(1), tokens()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    expected = torch.func.grad(functional_loss)(parameters, model, x)
    if how == "compiled-transform":
        actual = compiled(torch.func.grad(functional_loss))(parameters, model, x)
        assert [row.site.reason for row in fg_inductor.report()] == ["inside a torch.func transform"]
    else:
        inner = compiled(model)
        actual = torch.func.grad(functional_loss)({f"_orig_mod.{k}": p for k, p in parameters.items()}, inner, x)
        actual = {name.removeprefix("_orig_mod."): grad for name, grad in actual.items()}
        assert len(fg_inductor.report()) == 0
    double = {name: p.double() for name, p in parameters.items()}
    exact = torch.func.grad(functional_loss)(double, model, x.double())
    for name, grad in expected.items():
        assert_l2_as_accurate(actual[name], grad, exact[name], label=name)


def test_parameters_by_functional_call():
    """``functional_call`` without a transform is ordinary code: rewritten, and differentiable in the parameters."""
    model, x = Stack(1), tokens()
    names = [name for name, _ in model.named_parameters()]

    def results(loss, dtype):
        leaves = {name: p.detach().to(dtype).requires_grad_() for name, p in model.named_parameters()}
        return torch.autograd.grad(loss(leaves, model, x.to(dtype)), [leaves[name] for name in names])

    actual = results(compiled(functional_loss), torch.float32)
    assert fg_inductor.report().rewritten == 1
    plain, exact = (results(functional_loss, dtype) for dtype in (torch.float32, torch.float64))
    for one, other, third in zip(actual, plain, exact, strict=True):
        assert_l2_as_accurate(one, other, third)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_modes_on_a_gpu(mode):
    """CUDA graphs replay forward and backward: several steps, each with the gradients of its own input."""
    model = Stack().to("cuda", torch.bfloat16)
    options = {name: x for name, x in DENSE.items() if name != "fgattn.inner"} | {"mode": mode}
    run = compiled(model, options, fullgraph=True)
    double = copy.deepcopy(model).double()
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        x = tokens(device="cuda", dtype=torch.bfloat16)
        actual = gradients(model, run, {"x": x})
        actual = [g.clone() for g in actual]
        plain, exact = gradients(model, model, {"x": x}), gradients(double, double, {"x": x.double()})
        for one, other, third in zip(actual, plain, exact, strict=True):
            assert_l2_as_accurate(one, other, third)
    assert fg_inductor.report().rewritten == 2
    assert counters["inductor"]["cudagraph_skips"] == 0
