"""The rig: how a step is executed. Nothing else in the repository knows how a `Rig` is put on a model and a trainer.

Every part is a few lines over a library's feature, and each says with what it cannot be combined (`Rig`, `prepare`).
What they are for, on an 80 GB GPU and a 7B model (LOG.md has the measurements): eager layers are launched one kernel at
a time, and for a small batch the host takes longer to launch them than the GPU to run them. `compile` launches fewer,
`graphs` one thing a micro-batch; `recompute` decides what backward computes again; `fused_loss` scores each position
once and waits for nothing; `lean` brings the optimiser near to the memory's speed.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._ops import OpOverload
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy
from transformers import PreTrainedModel
from trl import SFTTrainer

from packlib import losses
from packlib.lab.runs.spec import Rig

Batch = dict[str, Any]
MAX_GRAD_NORM = 1.0  # transformers' default


# ---- what belongs into the model


def prepare(model: PreTrainedModel, rig: Rig, *, weighting: str = "per_token", one_shape: bool = False) -> None:
    """Put what belongs into the model into it. Raises `ValueError` where it cannot be, naming it.

    weighting: of the loss, as `LabTrainer` has it. one_shape: whether all micro-batches have one shape.
    """
    if rig.liger:
        fuse_layers(model)
    if rig.float8:
        quantize_products(model)
    if rig.fused_loss or weighting != "per_token":
        add_summed_loss(model)
    if rig.compile == "layers":
        compile_layers(model, dynamic=not one_shape)
    if rig.budget is not None:
        torch._functorch.config.activation_memory_budget = rig.budget
        torch._inductor.config.joint_custom_pre_pass = KeepAttention()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The repeated layers of a model: its longest list of modules."""
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)


def compile_layers(model: nn.Module, *, dynamic: bool) -> None:
    """Compile each decoder layer in place, inside whatever checkpoints it; all layers share their compiled code.

    dynamic: one compilation for rows of any length, or one for each length, which is faster.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for layer in decoder_layers(model):
        layer.compile(dynamic=dynamic)


class KeepAttention(CustomGraphPass):
    """Attention's output is kept for backward, whatever the budget.

    An operator of which PyTorch knows no FLOPs is free to be computed again in its eyes, and varlen attention is dear.
    """

    operators = ("packlib::sdpa_segments", "torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward")

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if isinstance(node.target, OpOverload) and node.target.name().split(".")[0] in self.operators:
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> str:
        return f"{type(self).__qualname__} of {', '.join(self.operators)}"


def quantize_products(model: nn.Module) -> None:
    """Matrix products of the layers in float8 with a scale a row (torchao), the output head as it was.

    Compiled code then rounds where eager code does. Else what backward computes again, fused with other neighbours than
    in forward, has other scales, and no longer fits what was kept (pytorch issue 150859; LOG.md has the gradients).
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    torch._inductor.config.emulate_precision_casts = True
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    convert_to_float8_training(
        model,
        config=Float8LinearConfig.from_recipe_name("rowwise"),
        module_filter_fn=lambda module, name: id(module) in inside,
    )


def fuse_layers(model: PreTrainedModel) -> None:
    """Put Liger's kernels for norms, rotary embeddings and gated MLPs into `model`, the rotary one for the process.

    One launch each instead of up to ten; the loss stays as it was. Raises `ValueError` where Liger knows nothing of the
    model's type, `ImportError` without liger-kernel.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(MODEL_TYPE_TO_APPLY_LIGER_FN)
        raise ValueError(f"liger: liger-kernel has no layers for {model.config.model_type}; it has {known}")
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def add_summed_loss(model: PreTrainedModel) -> None:
    """Let `model(…, labels=…, summed_loss=True, loss_weights=None)` return the sum of its next-token losses.

    Backbone first, then head and loss in one, without logits (`packlib.losses.linear_cross_entropy`); without
    `summed_loss` the forward is as it was. Raises `ValueError` for a model that does more to its logits than one
    product, or adds a router's loss.
    """
    config = model.config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"):
        if getattr(config, name, None) not in (None, 1.0):
            raise ValueError(f"fused_loss: {type(model).__name__} changes its logits by {name}; expected a plain head")
    if getattr(config, "output_router_logits", False):
        raise ValueError(f"fused_loss: {type(model).__name__} adds a router's loss; set output_router_logits = False")
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        labels: Tensor | None = None,
        summed_loss: bool = False,
        loss_weights: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not summed_loss:
            return original(*args, **kwargs) if labels is None else original(*args, labels=labels, **kwargs)
        if labels is None:
            raise ValueError("summed_loss = True without labels; expected int64 [B, T]")
        hidden = self.base_model(*args, **kwargs | {"use_cache": False}).last_hidden_state
        head = self.get_output_embeddings()
        bias = getattr(head, "bias", None)
        return losses.linear_cross_entropy(hidden, head.weight, labels, bias=bias, weights=loss_weights)

    model.forward = types.MethodType(forward, model)


def adapters(rig: Rig) -> Any:
    """The `peft.LoraConfig` for all linear layers, or None."""
    if rig.lora_rank is None:
        return None
    from peft import LoraConfig

    return LoraConfig(r=rig.lora_rank, lora_alpha=2 * rig.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")


# ---- what belongs into batches and settings


def flat_shapes(rig: Rig, max_tokens: int, segments: int) -> dict[str, int]:
    """Options of `FlatteningCollator` that make shapes repeat. segments: most segments of a micro-batch."""
    if not rig.pad_to:
        return {}
    room = 1 << segments.bit_length()  # a power of two with room for the pads
    return {"pad_to_multiple_of": rig.pad_to, "pad_segments_to": room, "max_seqlen_multiple_of": max_tokens}


def trainer_settings(rig: Rig) -> dict[str, Any]:
    """What belongs into the arguments of `trl.SFTConfig`."""
    recompute = rig.recompute == "all" and not rig.shard  # sharded layers are checkpointed where they are wrapped
    settings: dict[str, Any] = {
        "gradient_checkpointing": recompute,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if recompute else None,
        "max_grad_norm": MAX_GRAD_NORM,
    }
    if rig.lean:
        settings["accelerator_config"] = {"non_blocking": True}  # else each copy of a batch waits for the device
    if rig.shard:
        settings["fsdp"] = True
        settings["fsdp_config"] = {
            "version": 2,
            "activation_checkpointing": rig.recompute == "all",
            "state_dict_type": "SHARDED_STATE_DICT",  # a checkpoint is a file a rank
        }
    return settings


# ---- what belongs into a step


class LabTrainer(SFTTrainer):
    """SFTTrainer on a rig, which also keeps the loss and gradient norm of every step without waiting for them.

    weighting: `per_token`, or `per_example`: every example weighs alike, packed or not, over a whole optimiser step; or
        `longalign`: over all steps, each divided by `examples`, their mean number of labelled examples.
    """

    rig = Rig()
    weighting = "per_token"
    optimizer: Any
    is_fsdp_enabled: bool

    def __init__(
        self,
        *args: Any,
        rig: Rig | None = None,
        weighting: str = "per_token",
        examples: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.rig, self.weighting, self.examples = rig or Rig(), weighting, examples
        if weighting == "longalign" and not examples:
            raise ValueError(f"weighting = 'longalign' with examples = {examples}; expected the mean number a step")
        self.losses: list[Tensor] = []  # one a micro-batch
        self.grad_norms: list[Tensor] = []  # one a step
        self.step_ends: list[int] = []  # micro-batches so far, at the end of each step
        self.graphs: GraphedMicroBatches | None = None
        super().__init__(*args, peft_config=adapters(self.rig), **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.rig.shard and not self.is_fsdp_enabled:  # accelerate leaves sharding out on CPUs, without a word
            state = self.accelerator.state
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True
        if self._replicas:  # DDP would keep a second copy of all gradients, and hook into what is captured
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.rig.lean and self.optimizer is None:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            settings = self.args
            self.optimizer = LeanAdamW(
                trained,
                lr=settings.learning_rate,
                betas=(settings.adam_beta1, settings.adam_beta2),
                eps=settings.adam_epsilon,
                weight_decay=settings.weight_decay,
                zero=self._graphs_add,
            )
        return super().create_optimizer(*args, **kwargs)

    def capture(self, batches: Iterable[Batch]) -> int:
        """Capture a graph for each shape among `batches`, the largest first; returns how many there are.

        Nothing is trained: gradients are zero afterwards.
        """
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.graphs = GraphedMicroBatches(self._forward_backward, trained, add=self._graphs_add)
        if self._graphs_add:
            self.model.zero_grad = self._zero_in_place
        return self.graphs.capture(self._prepare_inputs(batch) for batch in batches)

    @property
    def _replicas(self) -> bool:
        """Whether ranks hold everything and add gradients up once a step, where they lie, without DDP."""
        return self.args.world_size > 1 and (self.rig.graphs or self.rig.lean)

    @property
    def _graphs_add(self) -> bool:
        """Whether graphs add to gradients where they lie: where a step has more than one micro-batch."""
        return self.rig.graphs and self.args.gradient_accumulation_steps > 1

    def _zero_in_place(self, set_to_none: bool = True) -> None:
        if not self.rig.lean:  # LeanAdamW has done it
            torch._foreach_zero_([p.grad for p in self.model.parameters() if p.grad is not None])

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        if self.graphs is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            model.train()
            loss = self.graphs(self._prepare_inputs(inputs), num_items_in_batch)
        self.losses.append(loss.detach())
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        plain = self.weighting == "per_token" and not self.rig.fused_loss
        if plain or not model.training or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        weights = None
        if self.weighting != "per_token":
            weights, _ = losses.token_weights(inputs["labels"], inputs.get("cu_seq_lens_q"), self.weighting)
        loss = model(**inputs, summed_loss=True, loss_weights=weights)
        return loss / num_items_in_batch * self.accelerator.num_processes

    def history(self) -> tuple[list[float], list[float]]:
        """Loss (summed over its micro-batches, the mean of all ranks) and gradient norm of every step.

        Waits for the device, and for the other ranks.
        """
        own = torch.stack(self.losses).double()
        so_far = [0.0, *self.accelerator.reduce(own, reduction="mean").cumsum(0).tolist()]
        losses = [so_far[end] - so_far[begin] for begin, end in pairwise([0, *self.step_ends])]
        return losses, torch.stack(self.grad_norms).double().tolist()

    def _forward_backward(self, batch: Batch, denominator: Tensor) -> Tensor:
        """As `training_step`, which finds a model that accelerate has put under autocast; a captured one never was."""
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            loss = self.compute_loss(self.model, dict(batch), num_items_in_batch=denominator)
        loss.backward()
        return loss.detach()

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        if self.weighting == "per_token":
            return super()._get_num_items_in_batch(batch_samples, device)
        if self.weighting == "longalign":
            return torch.tensor(self.examples, device=device)
        examples = torch.zeros((), device=device)
        for batch in batch_samples:
            _, count = losses.token_weights(batch["labels"], batch.get("cu_seq_lens_q"), self.weighting)
            examples += count.to(device)
        return self.accelerator.gather(examples).sum()

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        if self._replicas:
            average_over_ranks([p for p in self.model.parameters() if p.requires_grad])
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        norm = (
            optimizer.fold_clip(MAX_GRAD_NORM) if isinstance(optimizer, LeanAdamW) else super()._clip_grad_norm(model)
        )
        self.grad_norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).detach())
        self.step_ends.append(len(self.losses))
        return norm


def average_over_ranks(parameters: list[nn.Parameter]) -> None:
    """The gradient of each becomes its mean over all ranks, in place; one that a rank has none of counts as zero there.

    The same parameters in the same order on every rank. Waits on the device only.
    """
    for parameter in parameters:  # an expert that got no token on this rank alone, say
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    mean = gradients[0].is_cuda  # NCCL has it, gloo has not
    if not mean:
        torch._foreach_div_(gradients, dist.get_world_size())
    operation = dist.ReduceOp.AVG if mean else dist.ReduceOp.SUM
    for work in [dist.all_reduce(gradient, operation, async_op=True) for gradient in gradients]:
        work.wait()


class GraphedMicroBatches:
    """Forward and backward of micro-batches as CUDA graphs: captured once for each shape, replayed with other tokens.

    step: `step(batch, denominator)` computes a loss, adds to the gradients, and returns the loss; everything it does
        must be the same for batches of one shape, without asking the device anything. parameters: the trained ones.
    add: gradients of several micro-batches add up in one place, which has to be zeroed after a step. Otherwise each
        replay writes its own, over those of the graph that ran before: one micro-batch a step, nothing to add or zero.
    """

    def __init__(
        self, step: Callable[[Batch, Tensor], Tensor], parameters: list[nn.Parameter], *, add: bool = True
    ) -> None:
        self.step, self.parameters, self.add = step, parameters, add
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Batch, Tensor, Tensor, list[Tensor | None]]] = {}

    def capture(self, batches: Iterable[Batch]) -> int:
        """A graph for each shape among these batches; returns how many there are. Gradients are zero or none after."""
        shapes = {shape_of(batch): batch for batch in batches}
        if self.add:
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)  # graphs hold on to these
        largest_first = sorted(shapes, key=lambda shape: shapes[shape]["input_ids"].numel(), reverse=True)
        for shape in largest_first:  # smaller ones fit into its memory
            self.graphs[shape] = self._capture(shapes[shape])
        if self.add:
            torch._foreach_zero_([p.grad for p in self.parameters if p.grad is not None])
        return len(self.graphs)

    def _capture(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, Batch, Tensor, Tensor, list[Tensor | None]]:
        kept = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
        denominator = torch.ones((), device="cuda")
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # what is compiled, tuned or allocated once happens now
            for _ in range(2):
                self.step(kept, denominator)
                self._forget_gradients()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on as they like: NCCL's asks whether collectives have ended.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            loss = self.step(kept, denominator)
        gradients = [] if self.add else [_borrowed(parameter.grad) for parameter in self.parameters]
        self._forget_gradients()
        return graph, kept, denominator, loss, gradients

    def _forget_gradients(self) -> None:
        """So that backward writes gradients instead of adding to them, and the next graph may use their memory."""
        if not self.add:
            for parameter in self.parameters:
                parameter.grad = None

    def __call__(self, batch: Batch, denominator: Tensor | float) -> Tensor:
        """Loss of a batch, as `step` gives it. Raises `KeyError` for a shape that was not captured."""
        graph, kept, static_denominator, loss, gradients = self.graphs[shape_of(batch)]
        for name, value in batch.items():
            if isinstance(value, Tensor):
                kept[name].copy_(value, non_blocking=True)
        static_denominator.copy_(torch.as_tensor(denominator), non_blocking=True)
        graph.replay()
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.grad = gradient
        return loss.clone()


def _borrowed(tensor: Tensor | None) -> Tensor | None:
    """The memory of a tensor on a GPU without holding on to it: a graph's own, which later graphs write over."""
    if tensor is None:
        return None
    described = {"shape": (tensor.nbytes,), "typestr": "|u1", "data": (tensor.data_ptr(), False), "version": 3}
    memory = torch.as_tensor(types.SimpleNamespace(__cuda_array_interface__=described), device=tensor.device)
    return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def shape_of(batch: Batch) -> tuple:
    """What a graph depends on: shapes of tensors, and numbers."""
    found = {name: tuple(value.shape) if isinstance(value, Tensor) else value for name, value in batch.items()}
    return tuple(sorted(found.items()))


class LeanAdamW(torch.optim.Optimizer):
    """AdamW in one pass over memory: scales by the clip factor, updates, and zeroes the gradient where it lies.

    The arithmetic of `torch.optim.AdamW(fused=True)`: float32 inside, states and weights in the parameter's dtype. One
    compiled kernel a parameter, of 14 bytes (bfloat16; 16 with zeroing) for each of its elements: what has to be moved.

    zero: leave zeroed gradients behind, for graphs that add to them; otherwise the caller drops them.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        zero: bool,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.zero = zero
        self.scale: Tensor | None = None

    def fold_clip(self, max_norm: float) -> Tensor:
        """The norm of all gradients; the next `step` scales them by what brings it to `max_norm`."""
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        self.scale = (max_norm / (norm.float() + 1e-6)).clamp(max=1.0)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            device = group["params"][0].device
            numbers = _numbers(group).to(device, non_blocking=True)
            scale = torch.ones((), device=device) if self.scale is None else self.scale
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                tensors = (x.view(-1) for x in (p, p.grad, state["exp_avg"], state["exp_avg_sq"]))
                _compiled_update(device.type)(*tensors, numbers, scale, self.zero)
        self.scale = None


def _numbers(group: dict[str, Any]) -> Tensor:
    """The numbers of this step that `_update` takes, float32 on the host; counts the step."""
    group["step"] = group.get("step", 0) + 1
    beta1, beta2 = group["betas"]
    size = group["lr"] / (1 - beta1 ** group["step"])
    root = (1 - beta2 ** group["step"]) ** -0.5
    decay = 1 - group["lr"] * group["weight_decay"]
    return torch.tensor([beta1, 1 - beta1, beta2, 1 - beta2, size, root, group["eps"], decay], dtype=torch.float32)


def _update(
    p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, numbers: Tensor, scale: Tensor, zero: bool
) -> None:
    beta1, rest1, beta2, rest2, size, root, eps, decay = numbers.unbind()
    g = grad.float() * scale
    m = exp_avg.float() * beta1 + g * rest1
    v = exp_avg_sq.float() * beta2 + g * g * rest2
    p.copy_(p.float() * decay - size * m / (v.sqrt() * root + eps))
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    if zero:
        grad.zero_()


@functools.cache
def _compiled_update(device_type: str) -> Callable[..., None]:
    """One kernel for each size of parameter, of which a model has a handful; on a CPU as it is written."""
    if device_type == "cpu":
        return _update
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(_update, dynamic=False)
