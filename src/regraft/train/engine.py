"""transformers' Trainer, told what regraft decides itself: the loss, the order of the data, groups, schedule, files.

Everything random in a step is drawn from (seed, step, pass, process), set anew before each pass, so that a run that
goes on needs no saved state of generators and still draws what the uninterrupted one would have drawn. To the Trainer a
run is one long epoch (see `regraft.train.order`); that lets it enter anywhere.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

from regraft.errors import UserError
from regraft.resize import surgery
from regraft.train import heads, processes
from regraft.train.board import Board
from regraft.train.lora import restore_adapter, save_adapter
from regraft.train.objective import Objective
from regraft.train.options import TrainOptions
from regraft.train.order import Keyed, Order, Stream, example_seed
from regraft.train.schedule import factor, parameter_groups
from regraft.train.sharding import Divided, entire, part
from regraft.train.tap import unwrapped

EMA_FILE = "ema.pt"
SCHEDULER_FILE = transformers.trainer.SCHEDULER_NAME
STATE_FILE = transformers.trainer.TRAINER_STATE_NAME


class Engine(transformers.Trainer):
    """One run.

    Args:
        model: trained in place.
        objective: what is minimised.
        data: examples; with a length they are shuffled, else they are a stream.
        steps: optimiser steps of the whole run.
        folder: for checkpoints.
        adapter: the PEFT model whose adapter is trained, None to train the model; then checkpoints hold the adapter.
        tell: called after each step with (step, steps, figures).
        stop: asked after each step whether to end here, with a checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        data: Any,
        options: TrainOptions,
        steps: int,
        folder: Path,
        *,
        adapter: Any | None = None,
        device: str,
        tell: Callable[[int, int, Mapping[str, float]], None],
        stop: Callable[[], bool],
    ) -> None:
        self.objective, self.options, self.steps = objective, options, steps
        self.ema: dict[str, Tensor] | None = None
        self._data, self._begin, self._adapter = data, 0, adapter
        self.optimizer: Any
        self.lr_scheduler: Any
        self.control: Any
        self._sums: dict[str, Tensor] = {}
        self._passes = 0
        self.team = processes.team(device)
        self.board = Board(folder) if options.tensorboard else None
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=options.per_device_train_batch_size,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            max_grad_norm=options.max_grad_norm,
            learning_rate=options.learning_rate,
            bf16=options.bf16,
            seed=options.seed % 2**32,
            logging_steps=options.logging_steps,
            logging_nan_inf_filter=False,
            logging_first_step=True,
            save_strategy="steps" if options.save_steps else "no",
            save_steps=options.save_steps or 500,
            save_total_limit=options.save_total_limit,
            report_to=[],
            remove_unused_columns=False,
            label_names=[],
            ignore_data_skip=True,
            disable_tqdm=True,
            use_cpu=device == "cpu" or not processes.accelerated(),
            # Heads are called after the model: what is unused in its pass may still get a gradient.
            ddp_static_graph=heads.present(model),
        )
        self.divided = Divided(model, arguments.device) if options.fsdp else None
        super().__init__(
            model=model if self.divided is None else self.divided.model,
            args=arguments,
            data_collator=lambda pairs: objective.collate([e for _, e in pairs], [s for s, _ in pairs]),
            callbacks=[*([self.board] if self.board is not None else []), _Steps(self, tell, stop)],
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            what = "the run was launched with weights that accelerate is to divide among processes"
            raise UserError("RG309", what, fix="launch it without FSDP and DeepSpeed, and set fsdp to true")
        if self.divided is not None:
            # It is divided already, and is not to be wrapped so that all processes hold all of it.
            prepare = self.accelerator.prepare_model
            self.accelerator.prepare_model = lambda model, device_placement=None, evaluation_mode=False: prepare(
                model, device_placement=False, evaluation_mode=True
            )
        self.remove_callback(transformers.PrinterCallback)
        self.model_accepts_loss_kwargs = False

    def resume(self, checkpoint: Path | None) -> None:
        """Run to the end, or go on from a checkpoint to the end."""
        self._begin = 0
        if checkpoint is not None:
            state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
            self._begin = int(state["global_step"])
        try:
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        finally:
            if self.board is not None:
                self.board.close()

    def get_train_dataloader(self) -> DataLoader[Any]:
        o, world, rank = self.options, self.args.world_size, self.args.process_index
        passes = self.steps * o.gradient_accumulation_steps
        begin = self._begin * o.gradient_accumulation_steps
        batch = o.per_device_train_batch_size
        shared: dict[str, Any] = {
            "collate_fn": self.data_collator,
            "num_workers": o.dataloader_num_workers,
            # What makes batches is made while the program runs: a process that begins anew would not have it.
            "multiprocessing_context": "fork" if o.dataloader_num_workers else None,
            "pin_memory": self.args.device.type == "cuda",
        }
        if hasattr(self._data, "__len__"):
            order = Order(
                len(self._data),
                batch,
                passes * world,
                o.seed,
                o.shuffle,
                o.drop_last,
                rank=rank,
                world=world,
                start=begin,
            )
            return DataLoader(Keyed(self._data, o.seed), batch_sampler=order, **shared)
        stream = Stream(self._data, o.seed, batch, rank=rank, world=world, skip=begin)
        return DataLoader(stream, batch_size=batch, **shared)

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            o = self.options
            groups = parameter_groups(model or self.model, o.learning_rate, o.weight_decay, o.layer_lr_decay)
            if o.optimizer == "sgd":
                self.optimizer = torch.optim.SGD(groups, lr=o.learning_rate, momentum=o.momentum)
                return self.optimizer
            betas = (o.adam_beta1, o.adam_beta2)
            self.optimizer = torch.optim.AdamW(groups, lr=o.learning_rate, betas=betas, eps=o.adam_epsilon)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            o, total = self.options, self.steps
            warmup, cooldown = math.ceil(o.warmup_ratio * total), math.ceil(o.cooldown_ratio * total)

            def rate(step: int) -> float:
                return factor(o.lr_scheduler_type, step, total, warmup=warmup, cooldown=cooldown, floor=o.min_lr_ratio)

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, rate)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        step = self.state.global_step
        draw = example_seed(self.options.seed, -2 - self._passes % self.options.gradient_accumulation_steps, step)
        self._passes += 1
        torch.manual_seed((draw + self.args.process_index) % 2**63)
        self.objective.at(step, self.steps)
        loss, metrics = self.objective.loss(model, inputs)
        cheap = loss.device.type == "cpu" or step % self.options.logging_steps == 0
        if cheap and not bool(torch.isfinite(loss)):
            parts = ", ".join(f"{name} {float(value):.4g}" for name, value in metrics.items())
            what = f"the loss is {float(loss):.4g} in step {step + 1} ({parts})"
            fix = "lower learning_rate, raise warmup_ratio, or check the data and the models"
            raise UserError("RG604", what, fix=fix)
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        self._sums["passes"] = self._sums.get("passes", torch.zeros(())) + 1
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        return entire(super()._clip_grad_norm(model))

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        return entire(super()._get_grad_norm(model, grad_norm))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and (passes := float(self._sums.get("passes", 0.0))):
            parts = {name: value for name, value in self._sums.items() if name != "passes"}
            if self.args.world_size > 1 and parts:  # each process has seen its own batches
                sums = torch.stack([value.float().to(self.args.device) for value in parts.values()])
                parts = dict(zip(parts, self.accelerator.reduce(sums, reduction="mean"), strict=True))
            logs |= {name: float(value) / passes for name, value in parts.items()}
            self._sums = {}
        # What the Trainer would add, its epoch, is that of one long epoch which begins anew when a run goes on.
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # what the Trainer would count is wrong for modules that it does not know

    # -- files ---------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        whole = unwrapped(self.model)
        if self.divided is not None:
            self.divided.gather()
            whole = self.divided.whole
        ema = {name: entire(mean) for name, mean in self.ema.items()} if self.ema is not None else None
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            if self._adapter is not None:
                save_adapter(self._adapter, folder)
            else:
                with heads.without(whole) as extra:
                    surgery.save(whole, folder)
                heads.save(extra, folder)
            if ema is not None:
                torch.save(ema, folder / EMA_FILE)
        self.team.meet()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.divided is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        self.divided.save_moments(self.optimizer.optimizer, Path(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)
        self.team.meet()  # the state of the run, by which a checkpoint is known to be whole, comes after all parts

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.divided is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.divided.restore_moments(self.optimizer.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate  # which the state of the optimiser would bring

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if self._adapter is not None:
            restore_adapter(self._adapter, folder)
        else:
            whole = self.divided.whole if self.divided is not None else unwrapped(self.model)
            kept = surgery.load(folder, type(whole).__name__)
            target = unwrapped(model or self.model)
            if self.divided is not None:
                self.divided.scatter(dict(kept.named_parameters()) | dict(kept.named_buffers()))
            else:
                with heads.without(target) as extra:
                    target.load_state_dict(kept.state_dict())
                heads.load(extra, folder)
        if (folder / EMA_FILE).is_file():
            means = torch.load(folder / EMA_FILE, weights_only=True, map_location="cpu")
            weights = self._averaged()
            self.ema = {name: part(mean.to(self.args.device), weights[name]) for name, mean in means.items()}

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing to save: see the module's docstring."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to load."""

    # -- the running mean of the weights ------------------------------------------------------------------------

    def average(self) -> None:
        """Take the weights after a step into their running mean, and the statistics of normalisations with them."""
        o = self.options
        done = self.state.global_step
        if not o.ema or (done - 1) % o.ema_every:
            return
        with torch.no_grad():
            weights = self._averaged()
            if self.ema is None:
                self.ema = {name: value.detach().clone().float() for name, value in weights.items()}
                return
            taken = (done - 1) // o.ema_every + 1  # the first steps count more, so that the mean has no bias
            decay = min(o.ema, (1 + taken) / (10 + taken)) if o.ema_warmup else o.ema
            for name, mean in self.ema.items():
                mean.lerp_(weights[name].detach().float(), 1 - decay)

    def finish(self) -> None:
        """Give the model the running mean as its weights, if there is one, and make it whole."""
        if self.ema is not None:
            with torch.no_grad():
                for name, value in self._averaged().items():
                    value.copy_(self.ema[name])
        if self.divided is not None:
            self.divided.gather()

    def _averaged(self) -> dict[str, Tensor]:
        """What has a running mean: weights that are trained, and buffers of floats (of batch norms) that move."""
        bare = unwrapped(self.model)
        weights = {name: value for name, value in bare.named_parameters() if value.requires_grad}
        moving = {name: value for name, value in bare.named_buffers() if value.is_floating_point()}
        return {**weights, **moving}


class _Steps(transformers.TrainerCallback):
    """After each step: the running mean, the progress, and whether to stop."""

    def __init__(
        self, engine: Engine, tell: Callable[[int, int, Mapping[str, float]], None], stop: Callable[[], bool]
    ) -> None:
        self._engine, self._tell, self._stop = engine, tell, stop
        self._started: tuple[float, int] | None = None
        self._figures: dict[str, float] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._started is None:
            self._started = (time.monotonic(), state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._engine.average()
        assert self._started is not None
        begun, first = self._started
        done = state.global_step - first
        left = (time.monotonic() - begun) / done * (state.max_steps - state.global_step)
        self._tell(state.global_step, state.max_steps, {**self._figures, "seconds_left": left})
        # All of several processes have to stop behind the same step.
        if self._engine.team.any(self._stop()) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        self._figures = {name: float(value) for name, value in (logs or {}).items() if not name.startswith("train_")}


def checkpoints(folder: Path) -> Sequence[Path]:
    """The whole checkpoints in a folder, oldest first; a process that dies while it writes one leaves none."""
    found = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal():
            try:
                json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue  # the state is written last
            found.append((int(number), path))
    return [path for _, path in sorted(found)]
