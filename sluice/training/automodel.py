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
    config: dict[str, Json] = {
        "recipe": "TrainFinetuneRecipeForNextTokenPrediction",
        "seed": recipe.seed,
        "step_scheduler": {
            "global_batch_size": schedule.global_batch_size,
            "local_batch_size": local_batch_size(recipe),
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
        "model": _model(recipe, base_dir),
        "distributed": _distributed(recipe),
        "loss_fn": _loss(recipe),
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
            "save_consolidated": "final" if recipe.method == "full" else False,
        },
        # AutoModel's own reducer: a float64 kernel on accelerators, plain torch in float64 elsewhere.
        "clip_grad_norm": {"max_norm": optimizer.max_grad_norm, "backend": "triton"},
        "optimizer": _optimizer(recipe),
        "lr_scheduler": {
            "lr_decay_style": optimizer.decay,
            # AutoModel wants it shorter than the schedule: a drill of one step has no warm-up.
            "lr_warmup_steps": min(optimizer.warmup_steps, schedule.max_steps - 1),
            "min_lr": optimizer.minimum_learning_rate,
        },
    }
    return config | _method(recipe) | _float8(recipe)


def local_batch_size(recipe: Recipe) -> int:
    """Rows of one call of the model. A pipeline takes a step's whole share at once and cuts it into micro-batches
    itself (recipes/llm/train_ft.py:672: pp_batch_size is the local batch, pp_microbatch_size in `pipeline`)."""
    if recipe.parallelism.pp > 1:
        return recipe.schedule.global_batch_size // recipe.parallelism.dp
    return recipe.schedule.micro_batch_size


def _on_accelerators(recipe: Recipe) -> bool:
    return recipe.parallelism.backend == "nccl"


def _model(recipe: Recipe, base_dir: Path) -> dict[str, Json]:
    section: dict[str, Json] = {
        "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
        "pretrained_model_name_or_path": str(base_dir),
        "torch_dtype": recipe.precision.compute if recipe.method == "qlora" else recipe.precision.parameters,
        "attn_implementation": _attention(recipe),
        # AutoModel's own classes and low-rank kernels take its place, and it is off with tp or cp in any case.
        "use_liger_kernel": False,
    }
    if recipe.method == "qlora":
        # bitsandbytes quantizes while transformers loads; AutoModel's own classes cannot (model_init.py:1347).
        return section | {"force_hf": True}
    return section | {
        "backend": {
            "_target_": "nemo_automodel.components.models.common.BackendConfig",
            # Plain torch layers: low-rank pairs and float8 conversion replace torch.nn.Linear, not Transformer Engine's
            # (_peft/lora.py:483, fp8.py:117), and on a processor they give the same bits in every run.
            "attn": "sdpa",
            "linear": "torch",
            # On accelerators normalisation in float32, compiled into one kernel: bfloat16 would lose the small values.
            "rms_norm": "torch_fp32" if _on_accelerators(recipe) else "torch",
            "rope_fusion": False,
        },
    }


def _attention(recipe: Recipe) -> str:
    """FlashAttention skips the products between examples of a pack instead of masking them; AutoModel falls back to
    sdpa by itself where the package is missing. Rows without packs are as fast with torch's own flash kernel, and
    context parallelism knows no other (kernel_patches.py:318)."""
    return "flash_attention_2" if _on_accelerators(recipe) and recipe.data.packing else "sdpa"


def _method(recipe: Recipe) -> dict[str, Json]:
    """`peft` where low-rank pairs are trained, `quantization` where they are trained on 4-bit weights."""
    if recipe.method == "full":
        return {}
    lora, parallelism = recipe.lora, recipe.parallelism
    peft: dict[str, Json] = {
        "_target_": "nemo_automodel.components._peft.lora.PeftConfig",
        "target_modules": [f"*.{module}" for module in lora.target_modules],
        "dim": lora.rank,
        "alpha": lora.alpha,
        "dropout": lora.dropout,
        "use_dora": recipe.method == "dora",
        # Not to keep the smaller product of a pair but to compute it again saves memory on accelerators; on a processor
        # it costs time and saves what nobody lacks.
        "use_memory_efficient_lora": _on_accelerators(recipe),
        # One fused kernel for both products of a pair. It needs CUDA, and whole matrices in a plain layer
        # (infrastructure.py:159 switches it off with tp and pp, _peft/lora.py:492 for DoRA).
        "use_triton": _on_accelerators(recipe) and parallelism.tp == parallelism.pp == 1 and recipe.method == "lora",
    }
    if recipe.method != "qlora":
        return {"peft": peft}
    # As the QLoRA paper: normal-float 4 bits, their scales quantized again; stored as 16-bit numbers, so that FSDP2
    # can cut them (it shards floating-point tensors only).
    return {
        "peft": peft,
        "quantization": {
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_compute_dtype": recipe.precision.compute,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_quant_storage": recipe.precision.compute,
        },
    }


def _float8(recipe: Recipe) -> dict[str, Json]:
    """torchao's float8 training, where the recipe asks for it."""
    if not recipe.precision.fp8:
        return {}
    # Converting a projection that has a low-rank pair would silently drop the pair (fp8.py:231 replaces the module), so
    # those keep their precision; the output projection does because its errors are the loss's.
    kept = [] if recipe.method == "full" else list(recipe.lora.target_modules)
    sharded = recipe.parallelism.dp * recipe.parallelism.cp > 1
    return {
        "fp8": {
            "enabled": True,
            "recipe_name": "tensorwise",
            # Gather weights as float8: half the traffic; their scales in one collective instead of one each.
            "enable_fsdp_float8_all_gather": sharded and recipe.method == "full",
            "precompute_float8_dynamic_scale_for_fsdp": sharded and recipe.method == "full",
            "force_recompute_fp8_weight_in_bwd": sharded and recipe.method == "full",
            "filter_fqns": ["lm_head", *kept],
            "emulate": False,
        }
    }


def _distributed(recipe: Recipe) -> dict[str, Json]:
    parallelism, precision = recipe.parallelism, recipe.precision
    section: dict[str, Json] = {
        "strategy": "fsdp2",
        # Empty: what the other sizes leave of all processes.
        "dp_size": None,
        "tp_size": parallelism.tp,
        "pp_size": parallelism.pp,
        "cp_size": parallelism.cp,
        "sequence_parallel": False,
        "reshard_after_forward": parallelism.reshard_after_forward,
        "activation_checkpointing": parallelism.activation_checkpointing,
        # FSDP2 compiles layer by layer with this key; AutoModel reads its `compile` section for other strategies only
        # (infrastructure.py:714).
        "enable_compile": precision.compile,
        # Gradients of low-rank pairs wait whole until a step's last micro-batch: few bytes, fewer collectives. Those of
        # all weights are summed and cut at once, or every process would hold a whole gradient.
        "defer_fsdp_grad_sync": recipe.method != "full",
        # The next layer's weights are gathered while this one computes; on a processor there is nothing to overlap.
        "enable_fsdp2_prefetch": _on_accelerators(recipe),
        "mp_policy": {
            "_target_": "torch.distributed.fsdp.MixedPrecisionPolicy",
            "param_dtype": precision.compute,
            "reduce_dtype": precision.reduce,
            "output_dtype": None,
            "cast_forward_inputs": precision.compute != precision.parameters,
        },
    }
    if parallelism.pp > 1:
        section["pipeline"] = {
            # One forward, one backward: no more than pp micro-batches are in flight on the first stage.
            "pp_schedule": "1f1b",
            "pp_microbatch_size": recipe.schedule.micro_batch_size,
            # The loss is divided by all labels of the step already.
            "scale_grads_in_schedule": False,
        }
    return section


def _loss(recipe: Recipe) -> dict[str, Json]:
    """On accelerators projection and cross-entropy in one, 512 tokens at a time: scores over the vocabulary are never
    held for a whole row (2 GB for 4,096 tokens of 128,256 in float32). It takes neither a cut vocabulary nor pipeline
    stages (chunked_ce.py:285, train_ft.py:193)."""
    parallelism = recipe.parallelism
    if recipe.precision.fused_loss and _on_accelerators(recipe) and parallelism.tp == parallelism.pp == 1:
        return {"_target_": "nemo_automodel.components.loss.chunked_ce.ChunkedCrossEntropy"}
    return {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"}


def _optimizer(recipe: Recipe) -> dict[str, Json]:
    optimizer = recipe.optimizer
    section: dict[str, Json] = {
        "_target_": "torch.optim.AdamW",
        "lr": optimizer.learning_rate,
        "betas": list(optimizer.betas),
        "eps": optimizer.epsilon,
        "weight_decay": optimizer.weight_decay,
    }
    # One kernel for all weights; on processors torch's plain loop stays, whose bits are known.
    return section | {"fused": True} if _on_accelerators(recipe) else section
