"""Test utility: a denoising schedule with observed masks in eager mode and plain PyTorch; compiled code must equal it.

with EagerSchedule(model, settings=Settings(mask="observed", slice="16x8"), steps=6, branches=2) as eager:
    ...                     # the loop; the model's self attention runs the schedule
eager.refreshes             # how often a mask was observed
"""

import torch
from torch import Tensor, nn

from fg_inductor.kernels import ops, reference, reference_heads, reference_observed
from fg_inductor.kernels.query_order import TIME
from fg_inductor.settings import Settings


class EagerSchedule:
    """Runs self attention of ``models`` dense, or sparse by ``kernels.reference`` with masks observed now and then.

    It is dense in the first steps, and where a mask is observed.

    A model is called ``branches`` times a step, in the same order; steps are counted over all models. Query order is
    that of ``settings.token_grid`` where it is given, else none.
    """

    def __init__(self, *models: nn.Module, settings: Settings, steps: int, branches: int = 1):
        self.models, self.settings, self.steps, self.branches = models, settings, steps, branches
        self.dense = max(1, int(settings.dense_first * steps + 0.5)) if settings.dense_first else 0
        self.masks: dict[tuple, tuple[Tensor, int, Tensor]] = {}  # with the stage, and the mass that they kept at first
        self.calls = self.layer = self.refreshes = 0
        self.model: nn.Module | None = None

    def __enter__(self) -> "EagerSchedule":
        self._hooks = [model.register_forward_pre_hook(self._begin) for model in self.models]
        self._hooks += [model.register_forward_hook(self._end) for model in self.models]
        self._plain = torch.nn.functional.scaled_dot_product_attention
        torch.nn.functional.scaled_dot_product_attention = self._attend
        return self

    def __exit__(self, *_) -> None:
        torch.nn.functional.scaled_dot_product_attention = self._plain
        for hook in self._hooks:
            hook.remove()

    def _begin(self, model: nn.Module, _) -> None:
        self.model, self.layer = model, 0
        self.calls += 1

    def _end(self, *_) -> None:
        self.model = None

    def _attend(self, query, key, value, attn_mask=None, **kwargs) -> Tensor:
        step, branch = divmod(self.calls - 1, self.branches)
        cross = query.shape[2] != key.shape[2]
        if self.model is None or cross or step < self.dense:
            return self._plain(query, key, value, attn_mask, **kwargs)
        self.layer += 1
        settings, place = self.settings, (id(self.model), branch, self.layer)
        order = None
        if isinstance(settings.token_grid, tuple):
            settings = settings.with_order(True)
            order = ops.query_order(
                *settings.token_grid,
                0,
                0,
                settings.m,
                query.device,
                "rods",
                TIME if settings.time_step == "auto" else settings.time_step,
            )
            if settings.n > 1:
                key, value = (x[:, :, order.long()] for x in (key, value))
        settings = settings.with_order(False)
        shape = (None, order, query.shape[3] ** -0.5, settings.m, settings.n)
        stage = sum(step >= int(start * self.steps + 0.5) for start, _ in settings.stages) - 1
        if place not in self.masks or self._is_due(step, place, stage, query, key, shape):
            share = settings.stages[stage][1].share
            selection = (settings.reduce, settings.mass, share, settings.max_density)
            lse = (query @ key.mT * shape[2]).logsumexp(-1)
            heads, slots = query.shape[1], None
            masks = -(-heads // settings.heads_per_mask)
            if masks < heads:
                agreement = reference_observed.heads_agreement(query, key, lse, *shape, settings.reduce)
                slots = reference_heads.shared_slots(agreement, masks)
            mask = reference_observed.observed_mask(query, key, lse, *shape, *selection, slots=slots, masks=masks)
            if slots is not None:
                mask = reference_heads.expand_heads(mask, slots)
            self.masks[place] = mask, stage, reference_observed.kept_mass(query, key, mask, *shape)
            self.refreshes += 1
            return self._plain(query, key, value, attn_mask, **kwargs)
        return reference.attention(query, key, value, self.masks[place][0], *shape, settings.tail_kind)[0]

    def _is_due(self, step: int, place: tuple, stage: int, query: Tensor, key: Tensor, shape: tuple) -> bool:
        mask, stage_of_mask, kept = self.masks[place]
        if stage != stage_of_mask:
            return True
        if isinstance(self.settings.refresh, tuple):
            return step in self.settings.refresh
        if self.settings.drift is not None:
            return bool(reference_observed.kept_mass(query, key, mask, *shape) < kept - self.settings.drift)
        return (step - self.dense) % int(self.settings.refresh.split()[1]) == 0
