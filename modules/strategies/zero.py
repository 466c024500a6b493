"""Train under DeepSpeed's ZeRO with checkpoints that do not depend on the number of ranks.

Source: "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (arXiv 1910.02054).
DeepSpeed does the partitioning; added here:

- each rank reads only its own shard of a model (pruning/files/shares.py), so that no rank ever
  holds all of it; a frozen model keeps its type, such as bf16, while trained parameters are in
  float32;
- a checkpoint is one file with complete tensors, as from a run on one rank without DeepSpeed: it
  can be resumed on any number of ranks, under any stage, and without DeepSpeed. Frozen parameters
  are left out of it;
- CPU ranks (gloo) work like GPUs, so that a run can be tried anywhere.

The file is long because a strategy is one class of Lightning, and a third of it reads and writes
the flat buffers of DeepSpeed, which no other file does.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
import transformers.optimization  # noqa: F401 (torch's compiler: at DeepSpeed's start, too late)
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.shares import numel_of, read_shares
from secateur.pruning.widths.memory import LIVE_PARAMETERS


class Zero(DeepSpeedStrategy):
    """DeepSpeed's ZeRO on GPUs or CPU ranks, with checkpoints that resume on any number of ranks.

    Args:
        stage: What is sharded: 1 the optimiser states, 2 also the gradients, 3 also the parameters;
            only 3 saves the memory of a large frozen model.
        offload_parameters: Keep the parameter shards in host memory; stage 3.
        offload_optimizer: Keep the optimiser states, and compute its step, on the host; stage 2 or
            3.
        live_parameters: Number of parameters that a rank gathers in advance, beyond the layer that
            computes, 0 or more; stage 3.
        timeout_seconds: Time after which a rank gives up on the others in a collective operation,
            above 0.

    Raises:
        ValueError: A setting is out of its range, or needs another stage.
    """

    def __init__(
        self,
        stage: int = 3,
        offload_parameters: bool = False,
        offload_optimizer: bool = False,
        live_parameters: int = LIVE_PARAMETERS,
        timeout_seconds: float = 1800.0,
    ) -> None:
        if stage not in (1, 2, 3):
            raise ValueError(f"`stage` must be 1, 2 or 3, got {stage}.")
        if offload_parameters and stage != 3:
            raise ValueError(f"`offload_parameters` needs `stage` 3, got {stage}.")
        if offload_optimizer and stage == 1:
            raise ValueError("`offload_optimizer` needs `stage` 2 or 3, got 1.")
        if live_parameters < 0:
            raise ValueError(f"`live_parameters` must be 0 or more, got {live_parameters}.")
        if timeout_seconds <= 0:
            raise ValueError(f"`timeout_seconds` must be above 0, got {timeout_seconds}.")
        zero: dict[str, Any] = {
            "stage": stage,
            "contiguous_gradients": True,
            "reduce_bucket_size": 20_000_000,
            # The first number is the prefetch of a layer, the second one its limit in total.
            "stage3_prefetch_bucket_size": live_parameters,
            "stage3_max_live_parameters": live_parameters,
            "stage3_max_reuse_distance": 0,  # free a block after its use
        }
        if offload_parameters:
            zero["offload_param"] = {"device": "cpu"}
        if offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu"}
        super().__init__(
            config={
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,  # use the module's, on any device
            },
            timeout=timedelta(seconds=timeout_seconds),
        )
        self.stage, self.divides_models = stage, stage == 3
        self.offload_parameters, self.live_parameters = offload_parameters, live_parameters
        self._groups: list[list[Any]] = []  # parameters that train
        self._reached: set[nn.Parameter] = set()  # parameters with a gradient in this step

    # Process group.

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device  # needs an index

    def setup_environment(self) -> None:
        """Create the process group.

        Raises:
            ValueError: The accelerator or the precision is not supported.
        """
        assert self.accelerator is not None
        kind = self.root_device.type
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"`strategy` Zero runs on cuda and cpu, not on {kind}.")
        if self.precision_plugin.precision != "32-true":
            raise ValueError(
                f"`strategy` Zero trains in float32, got `trainer.precision` "
                f"{self.precision_plugin.precision}; leave it at 32-true and set the type of the "
                "frozen model by `--model.frozen.dtype bfloat16`."
            )
        if kind == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported
            import deepspeed

            # Gloo is sufficient; DeepSpeed's own backend would be compiled on first use.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # DeepSpeed's own use
            warnings.filterwarnings("ignore", f".*{name}` is deprecated", FutureWarning)
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()

    def connect(self, model: LightningModule) -> None:
        """Take a module on.

        Raises:
            ValueError: The module cannot be trained in this stage.
        """
        if self.divides_models and not getattr(model, "divisible", False):
            raise ValueError(
                "`strategy` Zero in `stage` 3 shards a model while it is read from a folder, and "
                f"this {type(model).__name__} starts from random weights. Use `stage` 2; or export "
                "it "
                "with `--trainer.max_steps 0` and give that folder as `base`."
            )
        super().connect(model)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        assert isinstance(self.config, dict)
        self.config["zero_optimization"]["overlap_comm"] = self.root_device.type == "cuda"
        self._init_deepspeed_distributed()

    # Reading models.

    def read_model(self, base: BaseModel, dtype: str) -> PreTrainedModel:
        """Read a model, see `LanguageModelling`: in stage 3 this rank's shard, otherwise all."""
        if self.stage != 3:
            return base.load(dtype)
        base.judge()
        wanted = base.dtype_of(dtype)
        with self._partitioned(wanted):
            model: Any = AutoModelForCausalLM.from_config(base.config, dtype=wanted)
        model.tie_weights()  # skipped together with the initialisation
        read_shares(model, base, self.share)
        assert isinstance(model, PreTrainedModel)
        return model

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Make models unsharded here; only `read_model` shards."""
        self._init_config_if_needed()
        yield

    @contextmanager
    def _partitioned(self, dtype: torch.dtype) -> Iterator[None]:
        import deepspeed
        from transformers.initialization import no_init_weights
        from transformers.integrations.deepspeed import prevent_arange_dtype_change

        with ExitStack() as stack:
            stack.enter_context(no_init_weights())
            stack.enter_context(prevent_arange_dtype_change())  # keeps rotary tables exact
            init = deepspeed.zero.Init(config_dict_or_path=self.config, dtype=dtype)
            # If the device lacks float16, as do CPUs without AVX512-FP16, its constructor uses
            # bfloat16 regardless of `dtype`.
            init.dtype = dtype
            stack.enter_context(init)
            yield

    # Training.

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: Any = None
    ) -> Any:
        assert optimizer is not None
        if type(optimizer).__module__.startswith("bitsandbytes"):
            raise ValueError(
                f"`optimizer` {type(optimizer).__name__} of bitsandbytes keeps its states in a "
                "form that `strategy` Zero cannot gather for a checkpoint; use "
                "torch.optim.AdamW, whose states Zero shards, or ddp."
            )
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        engine, wrapped = super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        if self.stage == 3:
            self._keep_whole(engine.optimizer)
            for parameter in (p for group in self._groups for p in group):
                parameter.register_post_accumulate_grad_hook(self._reached.add)
        return engine, wrapped

    def on_train_start(self) -> None:
        """Check that no epoch ends within a step, which DeepSpeed would carry over to the next
        epoch.

        Raises:
            ValueError: An epoch ends within a step.
        """
        super().on_train_start()
        assert self.lightning_module is not None
        trainer = self.lightning_module.trainer
        if trainer.num_training_batches % trainer.accumulate_grad_batches:
            raise ValueError(
                f"`trainer.limit_train_batches` leaves {trainer.num_training_batches} batches in "
                f"an epoch, not a multiple of the {trainer.accumulate_grad_batches} of a step "
                "(`trainer.accumulate_grad_batches`); `strategy` Zero needs a multiple."
            )

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Compute gradients; Lightning has already divided the loss by the batches of a step."""
        loss = super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)
        if self.stage == 3 and self.deepspeed_engine.is_gradient_accumulation_boundary():
            self._forget_old_gradients()
        return loss

    def _forget_old_gradients(self) -> None:
        """Zero old gradients of parameters that this step did not use: clipping counts them."""
        from deepspeed.utils import safe_set_local_grad

        for parameter in (p for group in self._groups for p in group if p not in self._reached):
            safe_set_local_grad(parameter, torch.zeros_like(parameter.ds_tensor))
        self._reached.clear()

    def _keep_whole(self, zero: Any) -> None:
        """Gather, now and after every step, the parameters that the module needs on every rank."""
        assert self.lightning_module is not None
        whole = list(getattr(self.lightning_module, "whole_parameters", list)())
        for parameter in whole:
            parameter.ds_persist = True
        known = {id(parameter) for parameter in zero.persistent_parameters}
        zero.persistent_parameters += [p for p in whole if id(p) not in known]
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        """Set up DeepSpeed for measuring, which only needs to gather parameters."""
        if self.stage == 3:
            self.model = self.fetching(model)
        else:
            self.model_to_device()

    def fetching(self, model: nn.Module) -> Any:
        """Make a sharded model gather parameters when it uses them.

        Args:
            model: The module that will be called; every call runs all its layers once.
        """
        if self.stage != 3:
            return model
        import deepspeed

        assert isinstance(self.config, dict)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": self.config["zero_optimization"],
        }
        return deepspeed.initialize(
            model=model, config=config, model_parameters=[], dist_init_required=False
        )[0]

    def share(self, parameter: Any) -> tuple[Tensor, int]:
        """This rank's shard of a parameter of stage 3, flat, and the index of its first entry."""
        share: Tensor = parameter.ds_tensor
        return share, share.ds_numel * torch.distributed.get_rank()  # type: ignore[attr-defined]

    @contextmanager
    def whole(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Gather some parameters on every rank for reading; every rank has to enter.

        Parameters that are already gathered stay so: DeepSpeed has scheduled their gathering.
        """
        import deepspeed

        away = deepspeed.runtime.zero.partition_parameters.ZeroParamStatus.NOT_AVAILABLE
        divided = [p for p in parameters if getattr(p, "ds_status", None) is away]
        with deepspeed.zero.GatheredParameters(divided, enabled=bool(divided)):
            yield

    def teardown(self) -> None:
        """Leave the model on its device: the export after training uses it."""
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    # Checkpoints: those of a single rank without DeepSpeed.

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # DeepSpeed copies the restored parameters

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Complete tensors of all trained parameters, and buffers; every rank has to call it.

        Tied parameters appear under all their names, as in any module state.
        """
        assert self.lightning_module is not None
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in self.lightning_module.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        state = self.lightning_module.state_dict()
        for name in chain.from_iterable(names.values()):
            state.pop(name, None)
        for index, group in enumerate(self._groups):
            for parameter in group:
                whole = self._gather(parameter, self._flat(index, parameter))
                state |= dict.fromkeys(names[parameter], whole)
        return state

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Restore each rank's shard of trained parameters, before DeepSpeed wraps the module."""
        assert self.lightning_module is not None
        state = dict(checkpoint["state_dict"])
        with torch.no_grad():
            of_module = self.lightning_module.named_parameters(remove_duplicate=False)
            for name, parameter in of_module:
                if hasattr(parameter, "ds_tensor") and name in state:
                    target, start = self.share(parameter)
                    flat = state.pop(name).flatten()[start : start + target.numel()]
                    target[: flat.numel()].copy_(flat)
        self.lightning_module.load_state_dict(state, strict=False)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        super(DDPStrategy, self).save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        return super(DDPStrategy, self).load_checkpoint(checkpoint_path, weights_only)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state as the optimiser would give it without sharding; every rank has to call it."""
        inner = self.deepspeed_engine.optimizer.optimizer
        states: dict[int, dict[str, Any]] = {}
        groups, number = [], 0
        for index, (settings, group) in enumerate(
            zip(inner.param_groups, self._groups, strict=True)
        ):
            numbers = range(number, number + len(group))
            groups.append(settings | {"params": list(numbers)})
            for number, parameter in zip(numbers, group, strict=True):
                flat = self._flat(index, parameter)
                if state := inner.state.get(flat):
                    states[number] = {
                        key: self._gather(parameter, value) if value.dim() else value.cpu().clone()
                        for key, value in state.items()
                    }
            number = numbers.stop
        return {"state": states, "param_groups": groups} if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Restore each rank's shard of the optimiser state, and of the float32 weights that it
        updates; the weights of the model may have a narrower type.
        """
        (saved,) = checkpoint["optimizer_states"]
        inner = self.deepspeed_engine.optimizer.optimizer
        assert self.lightning_module is not None
        names = {parameter: name for name, parameter in self.lightning_module.named_parameters()}
        number = 0
        for index, group in enumerate(self._groups):
            settings = {k: v for k, v in saved["param_groups"][index].items() if k != "params"}
            inner.param_groups[index].update(settings)
            for parameter in group:
                weights, (start, first, numel) = (
                    self._flat(index, parameter),
                    self._range(parameter),
                )
                whole = checkpoint["state_dict"][names[parameter]].flatten()
                weights.data[start : start + numel] = whole[first : first + numel].to(weights)
                if number in saved["state"]:
                    self._scatter(parameter, index, saved["state"][number], inner)
                number += 1

    # The flat vectors of DeepSpeed. A parameter is a range of one of them, on one or all ranks.

    def _flat(self, group: int, parameter: nn.Parameter) -> Tensor:
        """This rank's float32 vector that holds its shard of a parameter, if there is one."""
        zero = self.deepspeed_engine.optimizer
        if self.stage == 3:
            place = zero.grad_position[zero.get_param_id(parameter)][0]
            flat: Tensor = zero.fp32_partitioned_groups_flat[place]
        else:
            flat = zero.single_partition_of_fp32_groups[group]
        return flat

    def _range(self, parameter: Any) -> tuple[int, int, int]:
        """Start of the shard in the flat vector and in the parameter, and its number of entries."""
        if self.stage == 3:
            zero = self.deepspeed_engine.optimizer
            _, start, numel = zero.grad_position[zero.get_param_id(parameter)]
            first = numel * self.global_rank
            return start, first, max(0, min(numel, parameter.ds_numel - first))
        if parameter._hp_mapping is None:
            return 0, 0, 0
        here = parameter._hp_mapping.hp_fragment_address
        return here.start, parameter._hp_mapping.lp_fragment_address.start, here.numel

    def _gather(self, parameter: Any, flat: Tensor) -> Tensor:
        """The complete tensor, on the CPU of rank 0, from the flat vectors of all ranks."""
        whole = torch.zeros(numel_of(parameter), dtype=flat.dtype, device=self.root_device)
        start, first, numel = self._range(parameter)
        whole[first : first + numel] = flat[start : start + numel]
        torch.distributed.reduce(whole, dst=0)  # disjoint ranges: the sum is exact
        if not self.is_global_zero:
            return torch.empty(0)
        return whole.view(getattr(parameter, "ds_shape", parameter.shape)).cpu()

    def _scatter(
        self, parameter: Any, group: int, saved: Mapping[str, Any], inner: Optimizer
    ) -> None:
        flat = self._flat(group, parameter)
        start, first, numel = self._range(parameter)
        for key, value in saved.items():
            if not value.dim():  # the step count is where a fused optimiser needs it
                fused = inner.param_groups[group].get("fused")
                inner.state[flat][key] = value.to(flat.device if fused else "cpu", copy=True)
                continue
            mine = inner.state[flat].setdefault(key, torch.zeros_like(flat))
            mine[start : start + numel] = value.flatten()[first : first + numel].to(mine)
