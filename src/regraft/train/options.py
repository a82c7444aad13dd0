"""Options of a training run, under the names that users of transformers know."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from regraft.methods import Options


class TrainOptions(Options):
    """How to train, whatever the objective is."""

    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="AdamW, or gradient descent with momentum")
    momentum: float = Field(0.9, ge=0, lt=1, description="of gradient descent")
    learning_rate: float = Field(5e-5, gt=0, le=10, description="the highest learning rate")
    per_device_train_batch_size: int = Field(8, ge=1, description="examples per pass and device")
    gradient_accumulation_steps: int = Field(1, ge=1, description="passes whose gradients are averaged for one step")
    num_train_epochs: float = Field(3.0, gt=0, description="passes over the data, where max_steps is not given")
    max_steps: int | None = Field(None, ge=1, description="steps; needed for streams, which have no length")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_cooldown"] = Field(
        "cosine", description="how the learning rate falls after the warm-up"
    )
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    cooldown_ratio: float = Field(
        0.2, ge=0, le=1, description="share of the steps in which it falls, for constant_with_cooldown"
    )
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="share of the learning rate that is left at the end")
    weight_decay: float = Field(0.01, ge=0, description="decay of matrices; biases and norms do not decay")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of gradients")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of the mean of squared gradients")
    adam_epsilon: float = Field(1e-8, gt=0, description="added to the root of that mean")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are scaled down to this norm; 0 leaves them")
    layer_lr_decay: float = Field(
        1.0, gt=0, le=1, description="a block learns at this times the rate of the block above it; 1 for one rate"
    )
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay of a running mean of the weights, which is what is saved; 0 for none"
    )
    ema_every: int = Field(1, ge=1, description="steps between two that enter the running mean, the first one included")
    ema_warmup: bool = Field(
        True, description="the first steps count more, so that the mean has no bias to the start; else it begins there"
    )
    bf16: bool = Field(False, description="compute in bfloat16 where that is safe, weights stay in float32")
    gradient_checkpointing: bool = Field(False, description="compute activations again instead of keeping them")
    fsdp: bool = Field(
        False, description="divide weights, gradients and moments among the processes that the run was launched in"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the order of the data and of everything that is drawn")
    shuffle: bool = Field(True, description="draw the order of the data anew for each epoch; streams keep theirs")
    drop_last: bool = Field(False, description="leave out the last examples of an epoch that fill no batch")
    dataloader_num_workers: int = Field(0, ge=0, description="processes that read and prepare examples")
    logging_steps: int = Field(10, ge=1, description="steps between two lines of the log")
    save_steps: int = Field(
        500, ge=0, description="steps between two checkpoints that a stopped run goes on from; 0 for none"
    )
    save_total_limit: int = Field(1, ge=1, description="how many of these are kept")
    tensorboard: bool = Field(
        False, description="write logs that TensorBoard shows, into the folder `runs`; needs the package tensorboard"
    )

    @model_validator(mode="after")
    def _cooldown_fits(self) -> TrainOptions:
        if self.lr_scheduler_type == "constant_with_cooldown" and self.warmup_ratio + self.cooldown_ratio > 1:
            raise ValueError("warmup_ratio and cooldown_ratio are more than the whole run")
        return self
