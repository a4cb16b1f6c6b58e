"""A recipe, translated into the configuration of NeMo AutoModel's fine-tuning recipe.

AutoModel's stock class does the training; here are only its keys. The translation is a pure function, so a test can
read it, and what a recipe does not say has one value, given here with its reason.
"""

from __future__ import annotations

import math
from pathlib import Path

from sluice.provenance.canonical import Json
from sluice.training.recipe import Recipe


def automodel_config(recipe: Recipe, base_dir: Path, work_dir: Path) -> Json:
    """AutoModel's configuration as a JSON value."""
    schedule, optimizer = recipe.schedule, recipe.optimizer
    lora = recipe.method != "full"
    config: dict[str, Json] = {
        "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
        "seed": recipe.seed,
        "step_scheduler": {
            "global_batch_size": schedule.global_batch_size,
            "local_batch_size": schedule.micro_batch_size,
            "max_steps": schedule.max_steps,
            # Our loader is one long epoch: passes over the data are its business.
            "num_epochs": 1,
            "ckpt_every_steps": recipe.checkpoints.every_steps,
            # A checkpoint is for resuming here; it costs no validation pass and no extra write at an epoch's end.
            "save_checkpoint_every_epoch": False,
            "validate_on_checkpoint": False,
            "val_every_steps": schedule.validate_every_steps or schedule.max_steps,
        },
        "dist_env": {
            "backend": recipe.parallelism.backend,
            # The watch of each process (`watch.py`) comes first, with a finding; this is the second line.
            "timeout_minutes": math.ceil(2 * recipe.parallelism.collective_timeout_minutes),
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
        # Rows come from `rows.py`; AutoModel asks this section for the tokenizer only, and the next one for the kind of
        # attention mask that keeps packed examples apart.
        "dataset": {"_target_": "sluice.training.rows.AnswerRows"},
        "packed_sequence": {
            "packed_sequence_size": recipe.data.row_length if recipe.data.packing else 0,
            "packing_strategy": "neat",
        },
        "checkpoint": {
            # For loading the base and for the export at the end; what a run resumes from is ours.
            "enabled": True,
            "checkpoint_dir": str(work_dir / "automodel"),
            "model_save_format": "safetensors",
            "save_consolidated": False if lora else "final",
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
    return config
