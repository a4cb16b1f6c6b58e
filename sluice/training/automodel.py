"""A recipe, translated into the configuration of NeMo AutoModel's fine-tuning recipe.

AutoModel's stock class does the training; here are only its keys. The translation is a pure function, so a test can
read it, and what a recipe does not say has one value, given here with its reason.
"""

from __future__ import annotations

from pathlib import Path

from sluice.provenance.canonical import Json
from sluice.training.recipe import Recipe

CHECKPOINTS = "checkpoints"
CHAT_DATASET = "nemo_automodel.components.datasets.llm.chat_dataset.ChatDataset"
TRAIN_METRICS, VALIDATION_METRICS = "training.jsonl", "validation.jsonl"
INCOMPLETE = ".incomplete"
"""File that AutoModel keeps in a checkpoint folder while it writes it."""


def automodel_config(
    recipe: Recipe, base_dir: Path, train_file: Path, validation_file: Path | None, work_dir: Path
) -> Json:
    """AutoModel's configuration as a JSON value. Without a validation file no validation section, so no pass."""
    schedule, optimizer = recipe.schedule, recipe.optimizer
    config: dict[str, Json] = {
        "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
        "seed": recipe.seed,
        "step_scheduler": {
            "global_batch_size": schedule.global_batch_size,
            "local_batch_size": schedule.micro_batch_size,
            "max_steps": schedule.max_steps,
            # Empty: as many passes over the data as max_steps needs.
            "num_epochs": None,
            "ckpt_every_steps": recipe.checkpoints.every_steps,
            # A checkpoint is for resuming here; it costs no validation pass and no extra write at an epoch's end.
            "save_checkpoint_every_epoch": False,
            "validate_on_checkpoint": False,
            "val_every_steps": schedule.validate_every_steps or schedule.max_steps,
        },
        "dist_env": {
            "backend": recipe.parallelism.backend,
            "timeout_minutes": recipe.parallelism.collective_timeout_minutes,
        },
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
            "pretrained_model_name_or_path": str(base_dir),
            "torch_dtype": recipe.precision.parameters,
            "attn_implementation": "sdpa",
            "use_liger_kernel": False,
            "backend": {
                "_target_": "nemo_automodel.components.models.common.BackendConfig",
                # Plain torch kernels: they run on every device and give the same bits in every run.
                "attn": "sdpa",
                "linear": "torch",
                "rms_norm": "torch",
                "rope_fusion": False,
            },
        },
        "peft": {
            "_target_": "nemo_automodel.components._peft.lora.PeftConfig",
            "target_modules": [f"*.{module}" for module in recipe.lora.target_modules],
            "dim": recipe.lora.rank,
            "alpha": recipe.lora.alpha,
            "dropout": recipe.lora.dropout,
            "use_triton": False,
        },
        "distributed": {
            "strategy": "fsdp2",
            "dp_size": None,
            "tp_size": 1,
            "cp_size": 1,
            "sequence_parallel": False,
            "reshard_after_forward": recipe.parallelism.reshard_after_forward,
            "mp_policy": {
                "_target_": "torch.distributed.fsdp.MixedPrecisionPolicy",
                "param_dtype": recipe.precision.compute,
                "reduce_dtype": recipe.precision.reduce,
                "output_dtype": None,
                "cast_forward_inputs": recipe.precision.compute != recipe.precision.parameters,
            },
        },
        "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"},
        "dataset": chat_dataset(recipe, train_file),
        "packed_sequence": {"packed_sequence_size": 0},
        "dataloader": {
            "_target_": "torchdata.stateful_dataloader.StatefulDataLoader",
            "collate_fn": "nemo_automodel.components.datasets.utils.default_collater",
            "shuffle": True,
            "group_by_length": recipe.data.bucket_batches > 1,
        },
        "checkpoint": {
            "enabled": True,
            "checkpoint_dir": str(work_dir / CHECKPOINTS),
            "model_save_format": "safetensors",
            "save_consolidated": False,
            "max_recent_checkpoints": 2,
        },
        "clip_grad_norm": {"max_norm": optimizer.max_grad_norm},
        "optimizer": {
            "_target_": "torch.optim.AdamW",
            "lr": optimizer.learning_rate,
            "betas": list(optimizer.betas),
            "eps": optimizer.epsilon,
            "weight_decay": optimizer.weight_decay,
        },
        "lr_scheduler": {
            "lr_decay_style": optimizer.decay,
            "lr_warmup_steps": optimizer.warmup_steps,
            "min_lr": optimizer.minimum_learning_rate,
        },
    }
    if validation_file:
        config |= {
            "validation_dataset": chat_dataset(recipe, validation_file),
            "validation_dataloader": {
                "_target_": "torchdata.stateful_dataloader.StatefulDataLoader",
                "collate_fn": "nemo_automodel.components.datasets.utils.default_collater",
                "batch_size": recipe.schedule.micro_batch_size,
            },
        }
    return config


def chat_dataset(recipe: Recipe, path: Path) -> Json:
    """The dataset section: `messages` of each line through the model's chat template, loss on the answer only."""
    return {
        "_target_": CHAT_DATASET,
        "path_or_dataset_id": str(path),
        "seq_length": recipe.data.max_length,
        "padding": "do_not_pad",
        "truncation": True,
        # Without it AutoModel also trains the turn's header (`<|im_start|>assistant\n`), which the server supplies.
        "mask_generation_prompt": True,
    }
