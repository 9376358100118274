"""Whole video models of diffusers and transformers, tiny and random: the decision on each attention site, what it
found, and the result, where everything is kept, against the model as it is. ``models.py`` holds the table."""

import copy
import functools
import inspect
import os
import sys

import pytest
import torch
from model_cases import FRAMES, GRID, HEIGHT, MIN_SEQ, WIDTH, Build, Model, class_name, randomise
from models import MODELS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

import fg_inductor
from fg_inductor.passes import sdpa
from fg_inductor.settings import Settings
from fg_inductor.testing_passes import SMALL, PassBackend, run_pass

diffusers = pytest.importorskip("diffusers")

FEW = [name for name, model in MODELS.items() if model.by_default]
# Of those, one for each kind of site: self, masked and joint, text first, run-time lengths, masked and D 24, mixed.
FEW_TRAINED = ("Wan 2.1/2.2 T2V", "HunyuanVideo", "CogVideoX 2B", "Mochi", "Allegro", "Cosmos 3")


def few_or_full(names, few=FEW):
    """The representative few in every run, the rest under the mark ``full``."""
    return [pytest.param(name, marks=() if name in few else pytest.mark.full) for name in names]


@pytest.fixture
def dense_backend():
    """``set_attention_backend`` of one model changes the default of all: put it back."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    before = registry.get_active_backend()[0]
    yield
    registry.set_active_backend(before)


def build(case: Model):
    try:
        model = case.build()
    except AttributeError as error:
        pytest.skip(f"diffusers {diffusers.__version__}: {error}")
    return randomise(model)


def outputs(result):
    """The floating-point tensors that a model returned."""
    flat = torch.utils._pytree.tree_leaves(result)
    return [x for x in flat if isinstance(x, torch.Tensor) and x.is_floating_point()]


def same_call(case: Model, call):
    """The result of ``call(inputs)``, always from the same inputs: some models change theirs."""
    torch.manual_seed(1)
    return outputs(call(case.inputs()))


def to_float64(inputs):
    return tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs)


def exact_result(model, case: Model, run=lambda model, inputs: model(**inputs)):
    """What ``run`` of a float64 copy of the model gives, from the same inputs.

    A model whose own code computes in float32 gives what it does with another dense kernel: the two differ by rounding.
    """
    if not case.float64:
        with sdpa_kernel(SDPBackend.MATH):
            return same_call(case, lambda inputs: run(model, inputs))
    double = copy.deepcopy(model).double()
    return same_call(case, lambda inputs: run(double, to_float64(inputs)))


def assert_as_near(actual, plain, exact, anywhere=False):
    """Each tensor is as near to the exact one as without this package: twice its error, plus a rounding of them all.

    ``anywhere``: or twice the relative error of the worst tensor. Where a model casts to bfloat16 itself, a rounding of
    float32 now and then becomes one of bfloat16, and which tensor has it differs from kernel to kernel.
    """
    assert actual and len(actual) == len(plain) == len(exact)
    whole = torch.cat([x.double().flatten() for x in exact]).norm()
    relative = [(y.double() - x).norm() / x.double().norm() for y, x in zip(plain, exact, strict=True) if x.any()]
    worst = max(relative, default=0.0) if anywhere else 0.0
    for i, (ours, theirs, x) in enumerate(zip(actual, plain, exact, strict=True)):
        error, budget = ((y.double() - x).norm() for y in (ours, theirs))
        budget = 2 * max(budget, worst * x.double().norm()) + torch.finfo(ours.dtype).eps * whole
        assert error <= budget, f"tensor {i} of {len(exact)}: error {error:.2e}, budget {budget:.2e} of {x.norm():.2e}"


@pytest.mark.parametrize("name", few_or_full(MODELS))
def test_sites(name, dense_backend, one_thread):
    case = MODELS[name]
    model = build(case).eval()
    backend = PassBackend(Settings(**{**SMALL, "density": 1.0, "min_seq": MIN_SEQ}))
    compiled = torch.compile(model, backend=backend, fullgraph=case.fullgraph)
    with torch.no_grad():
        actual = same_call(case, lambda inputs: compiled(**inputs))
        assert [(site.kind, site.reason) for site in backend.sites] == case.sites
        rewritten = [site for site in backend.sites if site.rewritten]
        dense = sum(reason != "flex attention" for _, reason in case.sites) - case.rewritten
        assert backend.counts()[1:3] == (case.rewritten, case.rewritten)
        assert backend.counts()[0] + written_by_hand(backend) == dense
        grids = case.grids * len(rewritten) if len(case.grids) == 1 else case.grids
        assert tuple(site.details.get("token_grid", "") for site in rewritten) == grids[: len(rewritten)]
        for site in rewritten:
            assert site.details.get("text", "").startswith(case.text)
            assert ("key_mask" in site.details) == case.key_mask
        plain = same_call(case, lambda inputs: model(**inputs))
        assert_as_near(actual, plain, exact_result(model, case), not case.float64)


def written_by_hand(backend: PassBackend) -> int:
    """Sites that are left as matmul, softmax, matmul."""
    return sum(site.details.get("written as", "") != "" for site in backend.sites if not site.rewritten)


@pytest.mark.parametrize("name", few_or_full([name for name, case in MODELS.items() if case.blocks]))
def test_blocks_compiled_alone(name, dense_backend, one_thread):
    """``compile_repeated_blocks``: the layers of a class share one graph, and each kind of site is decided the same."""
    case = MODELS[name]
    model = build(case).eval()
    backend = PassBackend(Settings(**{**SMALL, "density": 1.0, "min_seq": MIN_SEQ}))
    with torch.no_grad():
        plain, exact = same_call(case, lambda inputs: model(**inputs)), exact_result(model, case)
        model.compile_repeated_blocks(backend=backend, fullgraph=True)
        assert_as_near(same_call(case, lambda inputs: model(**inputs)), plain, exact, not case.float64)
    decided = {(site.kind, site.reason) for site in backend.sites}
    assert decided <= set(case.sites)
    assert {site for site in case.sites if not site[1]} <= decided


@pytest.mark.parametrize(
    "name", few_or_full([name for name, case in MODELS.items() if case.trains and case.rewritten], FEW_TRAINED)
)
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.full)])
def test_training_step(name, checkpointing, dense_backend, one_thread):
    """Through the backend and AOTAutograd: the gradients of all parameters."""
    case = MODELS[name]
    model = build(case).train()
    if checkpointing:
        if not (getattr(model, "_supports_gradient_checkpointing", False) and case.checkpoints):
            pytest.skip("the model has no gradient checkpointing that Dynamo traces")
        model.enable_gradient_checkpointing()
    options = {f"fgattn.{key}": x for key, x in {**SMALL, "density": 1.0, "min_seq": MIN_SEQ}.items()}
    options |= {"fgattn.inner": "aot_eager"}
    compiled = torch.compile(model, backend="fgattn", options=options, fullgraph=case.fullgraph)

    def gradients(run, inputs):
        torch.manual_seed(2)
        loss = sum(x.square().mean() for x in outputs(run(**inputs)))
        parameters = [x for x in run.parameters() if x.requires_grad]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return [torch.zeros_like(p) if x is None else x for x, p in zip(found, parameters, strict=True)]

    actual, plain = (same_call(case, functools.partial(gradients, run)) for run in (compiled, model))
    report = fg_inductor.report()
    assert sum(row.site.rewritten for row in report) >= case.rewritten
    assert not [row.site for row in report if row.site.reason == "error in the pass"]
    assert_as_near(actual, plain, exact_result(model, case, gradients), not case.float64)


def test_every_video_transformer_is_in_the_table():
    """A class that a new diffusers brings must be looked at."""
    from diffusers.models import transformers

    known = set(map(class_name, MODELS.values()))
    classes = {name for name in dir(transformers) if inspect.isclass(getattr(transformers, name))}
    video = {name for name in classes if "Transformer3D" in name or "Video" in name or name.startswith("Cosmos")}
    assert not video - known


# One model in other ways


def wan():
    return MODELS["Wan 2.1/2.2 T2V"].build()


def wan_inputs():
    return MODELS["Wan 2.1/2.2 T2V"].inputs()


DECIDED = [("self", "rewritten"), ("cross", "dense")] * 2


def test_min_seq_alone_keeps_text_dense():
    """At ``min_seq`` 1 the refiner of the text is self attention like any other; cross attention stays dense."""
    with torch.no_grad():
        case = MODELS["HunyuanVideo"]
        sites = run_pass(case.build().eval(), case.inputs()).sites
        assert [site.reason for site in sites] == ["mask is not a key mask", "", ""]
        sites = run_pass(wan().eval(), wan_inputs()).sites
    assert [site.reason for site in sites] == ["", "cross attention"] * 2


def test_one_graph_for_all_resolutions():
    """No recompile, and (PassBackend checks) no guard that the pass added."""
    model, backend = wan().eval(), PassBackend(Settings(**SMALL, density=1.0))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for frames, height, width in ((3, 8, 10), (4, 12, 14), (5, 6, 16), (6, 16, 18)):
            inputs = wan_inputs()
            inputs["hidden_states"] = torch.randn(1, 4, frames, height, width)
            for dim in (2, 3, 4):
                torch._dynamo.mark_dynamic(inputs["hidden_states"], dim)
            torch.testing.assert_close(compiled(**inputs), model(**inputs))
    assert len(backend.graphs) == 1
    assert [site.kind for site in backend.sites if site.rewritten] == ["self", "self"]
    assert len(backend.calls(torch.ops.fgattn.query_order.default)) == 1


def lines_run(layers: int) -> int:
    """How many lines of ``passes`` are run for HunyuanVideo with so many layers of each kind."""
    build = MODELS["HunyuanVideo"].build
    model = Build(build.name, **{**build.config, "num_layers": layers, "num_single_layers": layers})().eval()
    count = 0

    def trace(frame, event, _):
        nonlocal count
        count += event == "line"
        return trace if frame.f_code.co_filename.startswith(os.path.dirname(sdpa.__file__)) else None

    def backend(gm, inputs):
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            sites = sdpa.rewrite(gm, Settings(**{**SMALL, "min_seq": MIN_SEQ}))
        finally:
            sys.settrace(before)
        assert sum(site.rewritten for site in sites) == 2 * layers
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(**MODELS["HunyuanVideo"].inputs())
    torch._dynamo.reset()
    return count


def test_the_pass_is_linear_in_layers(one_thread):
    """Its work, not its time: each layer more runs as many lines more."""
    lines_run(1)  # fills caches
    one, two, three = map(lines_run, (1, 2, 3))
    assert two > one
    assert three - two == pytest.approx(two - one, rel=0.02)


def test_token_grid_of_a_block():
    """Nothing in the graph of a block shows the token grid, but it can be given."""
    model, inputs = wan().eval(), wan_inputs()
    with torch.no_grad():
        expected = model(**inputs)
        backend = PassBackend(Settings(**SMALL, density=1.0, token_grid=(FRAMES, HEIGHT, WIDTH)))
        model.compile_repeated_blocks(backend=backend, fullgraph=True)
        torch.testing.assert_close(model(**inputs), expected)
    assert [(site.path, site.kind) for site in backend.sites] == [("attn1", "self"), ("attn2", "cross")]
    assert backend.sites[0].rewritten and backend.sites[0].details["token_grid"] == GRID


def test_paths_of_checkpointed_blocks():
    model, inputs = wan().train(), wan_inputs()
    model.enable_gradient_checkpointing()
    done = run_pass(model, inputs, density=1.0)
    assert [(site.path, site.rewritten) for site in done.sites] == [
        ("blocks.0.attn1", True), ("blocks.0.attn2", False), ("blocks.1.attn1", True), ("blocks.1.attn2", False)
    ]  # fmt: skip
    assert {site.details.get("token_grid") for site in done.sites if site.rewritten} == {GRID}


# What must not change a decision: adapters, fused and quantised projections, modes of autograd


def with_adapter(model):
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False))


def with_fused_projections(model):
    model.fuse_qkv_projections()


def with_quantised_linears(config):
    def change(model):
        quantisation = pytest.importorskip("torchao.quantization")
        quantisation.quantize_(model.to(torch.bfloat16), getattr(quantisation, config)())

    change.__name__ = config
    return change


CHANGES = [
    with_adapter,
    with_fused_projections,
    with_quantised_linears("Int8WeightOnlyConfig"),
    with_quantised_linears("Int8DynamicActivationInt8WeightConfig"),
    with_quantised_linears("Float8WeightOnlyConfig"),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_projections(change):
    torch.manual_seed(0)
    model, inputs = randomise(wan()).eval(), wan_inputs()
    change(model)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    inputs = {k: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in inputs.items()}
    with torch.no_grad():
        done = run_pass(model, inputs, density=1.0)
        assert [(site.kind, site.decision) for site in done.sites] == DECIDED
        plain = model(**inputs)
        if dtype == torch.float32:
            exact = copy.deepcopy(model).double()(**to_float64(inputs))
        else:  # a quantised model has no float64: two dense kernels differ by rounding alone
            with sdpa_kernel(SDPBackend.MATH):
                exact = model(**inputs)
    assert_as_near(*map(outputs, (done.result, plain, exact)))


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad, torch.enable_grad], ids=lambda mode: mode.__name__
)
def test_modes_of_autograd(mode):
    model, inputs = randomise(wan()).eval(), wan_inputs()
    with mode():
        done = run_pass(model, inputs, density=1.0)
        assert [(site.kind, site.decision) for site in done.sites] == DECIDED
        torch.testing.assert_close(done.result, model(**inputs))


# Video encoders of transformers, in eager and SDPA form; text encoders


def encoders():
    transformers = pytest.importorskip("transformers")
    common = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    feed_forward = {"intermediate_size": 64}
    video = {"image_size": 32, "num_frames": 6}
    return transformers, {
        "VideoMAE": (
            transformers.VideoMAEModel,
            transformers.VideoMAEConfig(**common, **feed_forward, **video, patch_size=8, tubelet_size=2),
        ),
        "ViViT": (
            transformers.VivitModel,
            transformers.VivitConfig(**common, **feed_forward, **video, tubelet_size=[2, 8, 8]),
        ),
        "V-JEPA 2": (
            transformers.VJEPA2Model,
            transformers.VJEPA2Config(
                **common, patch_size=8, crop_size=32, frames_per_clip=6, tubelet_size=2, mlp_ratio=1,
                pred_hidden_size=32, pred_num_attention_heads=2, pred_num_hidden_layers=1,
            ),
        ),
        "TimeSformer": (
            transformers.TimesformerModel,
            transformers.TimesformerConfig(**common, **feed_forward, **video, patch_size=8),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("written", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "sites"),
    [("VideoMAE", [("self", "")]), ("ViViT", [("self", "")]), ("V-JEPA 2", [("self", ""), ("self", "")])],
)
def test_video_encoders(name, sites, written):
    _, table = encoders()
    model, config = table[name]
    config._attn_implementation = written
    model = randomise(model(config)).eval()
    pixels = {"pixel_values_videos" if name == "V-JEPA 2" else "pixel_values": torch.randn(1, 6, 3, 32, 32)}
    with torch.no_grad():
        done = run_pass(model, pixels, density=1.0, min_seq=MIN_SEQ)
        plain, exact = model(**pixels), copy.deepcopy(model).double()(**to_float64(pixels))
    assert_as_near(*map(outputs, (done.result, plain, exact)))
    assert [(site.kind, site.reason) for site in done.sites] == sites
    assert all(("written as" in site.details) == (written == "eager") for site in done.sites)


def test_time_sformer_is_factorised():
    _, table = encoders()
    model, config = table["TimeSformer"]
    model = randomise(model(config)).eval()
    with torch.no_grad():
        sites = run_pass(model, {"pixel_values": torch.randn(1, 6, 3, 32, 32)}).sites
    assert [(site.kind, site.decision) for site in sites] == [("self", "dense")] * 2
    assert {site.reason for site in sites} <= {"factorised attention"}


TEXT_ENCODERS = {
    "UMT5": ("mask", {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}),
    "Llama": ("causal", {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
                         "num_key_value_heads": 2}),
    "CLIPText": ("causal", {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
                            "num_attention_heads": 2, "projection_dim": 16}),
}  # fmt: skip


@pytest.mark.parametrize("written", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_text_encoders_stay_dense(name, written):
    transformers = pytest.importorskip("transformers")
    _, config = TEXT_ENCODERS[name]
    config = getattr(transformers, f"{name}Config")(vocab_size=64, **config)
    config._attn_implementation = written
    suffix = "EncoderModel" if name == "UMT5" else "Model"
    model = getattr(transformers, f"{name}{suffix}")(config).eval()
    inputs = {"input_ids": torch.arange(48)[None], "attention_mask": torch.ones(1, 48).long()}
    with torch.no_grad():
        done = run_pass(model, inputs, fullgraph=False)
    assert done.sites and {site.decision for site in done.sites} == {"dense"}
    assert {site.reason for site in done.sites} <= {"mask is not a key mask", "mask needs gradients", "causal"}
