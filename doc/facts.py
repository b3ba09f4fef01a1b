"""The records and shapes that the report and the slides speak of, under the names that doc/source/*.md use for them.

`hf` runs Hugging Face's code, `no_flce` all Liger kernels but fused linear cross-entropy, `liger` all four; 8 x 1024
tokens with gradient checkpointing on one GPU unless the name says otherwise.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from doc import evidence, original, report_tables, tables
from doc.evidence import ALL_KERNELS, NO_FLCE, NO_KERNELS, Folder, Record, Shape, Study
from src import study
from src.config import STRATEGIES, RunConfig, Strategy, config_of
from src.explain.categories import CATEGORIES
from src.figures import setting_words

BATCHES = (1, 4, 8, 16, 32)
OFFLOADED = ((NO_KERNELS, 4), (ALL_KERNELS, 4), (NO_KERNELS, 32), (ALL_KERNELS, 32), (ALL_KERNELS, 96))
CARD = {"find_max": "batch_size", "gpu_memory_gib": 24, "iterations": 5, "warmup": 2}
MODELS = tuple(map(Shape, ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.1-8B")))


def context() -> dict[str, Any]:
    """Every name that a template may use, but for the filters."""
    studies = evidence.studies()
    return {**_one_gpu(), **_peaks(), **_offload(studies), **_documents(studies)}


def by_batch(folder: Folder, checkpointing: bool) -> list[Record]:
    """The three strategies' runs at 1024 tokens, as far as they are there."""
    found = (
        folder.find(strategy, batch_size=batch, gradient_checkpointing=checkpointing)
        for strategy in STRATEGIES.values()
        for batch in BATCHES
    )
    return [record for record in found if record is not None]


def alone(folder: Folder) -> list[Record]:
    """Each kernel by itself, between none of them and more of them together."""
    single = [Strategy.only(name) for name in Strategy().kernels]
    return [folder.run(strategy) for strategy in (NO_KERNELS, *single, NO_FLCE, ALL_KERNELS)]


def presets(folder: Folder) -> list[tuple[Record, Record]]:
    """Offloaded runs under the original's settings, and under ours."""
    return [
        tuple(folder.run(strategy, preset=preset, batch_size=batch) for preset in ("seed", "fast"))
        for strategy, batch in OFFLOADED
    ]


def ladder() -> list[tuple[str, Record | None]]:
    """What to turn on, one after the other, at 32 x 1024 tokens, in words and as runs."""
    h100, offload = evidence.folder("h100_single_gpu"), evidence.folder("h100_offload")
    kept = {"gradient_checkpointing": False}
    return [
        ("nothing", h100.find(NO_KERNELS, batch_size=32, **kept)),
        ("checkpointing", h100.find(NO_KERNELS, batch_size=32)),
        ("all Liger kernels", h100.find(ALL_KERNELS, batch_size=32, **kept)),
        ("all Liger kernels, checkpointing", h100.find(ALL_KERNELS, batch_size=32)),
        ("all Liger kernels, checkpointing, offload (fast)", offload.find(preset="fast", batch_size=32)),
    ]


def beside_the_original(studies: Sequence[Study]) -> list[tuple[study.Cell, Record, Record]]:
    """Cells at 1024 tokens of which the original study published a peak, and those of ours under its settings."""
    columns = original.original(), evidence.study_with(original.OFFLOAD["seed"], studies).column
    cells = [cell for cell in study.GRID if cell.seq_length == study.FIXED_LENGTH]
    return [(cell, *peaks) for cell in cells if all(peaks := [column.ran(cell) for column in columns])]


def _one_gpu() -> dict[str, Any]:
    h100 = evidence.folder("h100_single_gpu")
    kept = {"gradient_checkpointing": False}
    hf, liger, no_flce, flce = (h100.run(s) for s in (NO_KERNELS, ALL_KERNELS, NO_FLCE, Strategy.only("flce")))
    checkpointed, kept_runs = by_batch(h100, True), by_batch(h100, False)
    larger = [
        {"batch_size": 16, "model_name": "meta-llama/Llama-3.2-3B-Instruct"},
        {"batch_size": 1, "model_name": "meta-llama/Llama-3.1-8B-Instruct"},
        {"batch_size": 8, "model_name": "meta-llama/Llama-3.1-8B-Instruct"},
        {"batch_size": 1, "seq_length": 8192},
        {"batch_size": 1, "seq_length": 32768},
        {"batch_size": 4, "dtype": "fp32"},
    ]
    return {
        "h100": h100,
        "card_gib": CARD["gpu_memory_gib"],
        "model": MODELS[0],
        "models": MODELS,
        "tokens": config_of(hf).tokens_per_step,
        "hf": hf,
        "liger": liger,
        "no_flce": no_flce,
        "flce": flce,
        "rms_norm": h100.run(Strategy.only("rms_norm")),
        # Shares of what all four kernels save that FLCE alone, and the three others, bring.
        "flce_memory_share": _saved(hf, flce, "peak_memory_bytes") / _saved(hf, liger, "peak_memory_bytes"),
        "others_time_share": _saved(hf, no_flce, "latency_s") / _saved(hf, liger, "latency_s"),
        "hf_kept": h100.run(NO_KERNELS, **kept),
        "no_flce_kept": h100.run(NO_FLCE, **kept),
        "liger_kept": h100.run(ALL_KERNELS, **kept),
        "hf_4": h100.run(NO_KERNELS, batch_size=4),
        "liger_4": h100.run(ALL_KERNELS, batch_size=4),
        "hf_1": h100.run(NO_KERNELS, batch_size=1),
        "liger_1": h100.run(ALL_KERNELS, batch_size=1),
        "hf_32": h100.run(NO_KERNELS, batch_size=32),
        "liger_32": h100.run(ALL_KERNELS, batch_size=32),
        "hf_32_kept": h100.find(NO_KERNELS, batch_size=32, **kept),
        "liger_32_kept": h100.run(ALL_KERNELS, batch_size=32, **kept),
        "adafactor": h100.run(ALL_KERNELS, optimizer="adafactor"),
        "hf_by_batch": [h100.run(NO_KERNELS, batch_size=batch) for batch in BATCHES],
        "checkpointed": checkpointed,
        "kept": kept_runs,
        "fastest": max(r["throughput_tokens_per_s"] for r in kept_runs + checkpointed if r["status"] == "ok"),
        "alone": alone(h100),
        "ladder": ladder(),
        "larger": [(h100.find(NO_KERNELS, **cell), h100.find(ALL_KERNELS, **cell)) for cell in larger],
        "largest_hf": h100.run(NO_KERNELS, **CARD)["frontier"],
        "largest_liger": h100.run(ALL_KERNELS, **CARD)["frontier"],
    }


def _saved(before: Record, after: Record, key: str) -> float:
    return before[key] - after[key]


def peaks() -> dict[str, Record]:
    """Runs with a breakdown of their peak, without and with Liger kernels."""
    single, offload = evidence.folder("h200_single_gpu"), evidence.folder("h200_offload")
    return {
        "one GPU, none": single.run(NO_KERNELS),
        "one GPU, all": single.run(ALL_KERNELS),
        "offload, none": offload.run(NO_KERNELS, preset="fast", batch_size=8),
        "offload, all": offload.run(ALL_KERNELS, preset="fast", batch_size=8),
    }


def _peaks() -> dict[str, Any]:
    runs, blocks = peaks(), _loss_blocks("bs8_seq1024_ropeFalse_siluFalse_rmsFalse_flceFalse")
    names = ("peak_hf", "peak_liger", "peak_offload_hf", "peak_offload_liger")
    return {
        "peaks": runs,
        **dict(zip(names, runs.values())),
        "loss_blocks": blocks,
        "whole_fp32_logits": blocks.count(MODELS[0].logits_bytes(8 * 1024, 4)),
        "share": share,
        "levers": evidence.folder("h200_offload").records,
    }


def share(record: Record, *categories: str) -> float:
    """The share of the peak that these categories of memory have."""
    if unknown := set(categories) - set(CATEGORIES):
        raise evidence.UsageError(f"unknown categories {sorted(unknown)}")
    return sum(record["peak_breakdown"][name] for name in categories) / record["breakdown_peak_bytes"]


def _loss_blocks(name: str) -> list[int]:
    """Bytes of each block that the loss holds at the peak."""
    return [block.size for block in evidence.snapshot(name).at_peak() if block.category == "logits_and_loss"]


def _offload(studies: Sequence[Study]) -> dict[str, Any]:
    offload, h200 = evidence.folder("h100_offload"), evidence.folder("h200_offload")
    published = original.original().cells
    hf_4, hf_8 = (published[study.Cell(NO_KERNELS.title, b, 1024)]["peak_memory_bytes"] for b in (4, 8))
    seed_4, seed_32 = (offload.run(NO_KERNELS, preset="seed", batch_size=b)["peak_memory_bytes"] for b in (4, 32))
    beside = beside_the_original(studies)
    limited = dataclasses.replace(original.OFFLOAD["seed"], memory_limit_gib=original.CARD_GIB)
    ratios = [
        ours["peak_memory_bytes"] / theirs["peak_memory_bytes"]
        for cell, theirs, ours in beside
        if cell.strategy == ALL_KERNELS.title
    ]
    logits = 1024 * MODELS[0].config.vocab_size  # numbers of one sequence
    checkpoints = MODELS[0].checkpoint_bytes(1024)
    return {
        "presets": presets(offload),
        "originals": beside,
        "agreement": original.agreement(original.original(), evidence.study_with(limited, studies).column),
        "originals_all_off": max(abs(ratio - 1) for ratio in ratios),
        "seed_4": offload.run(preset="seed", batch_size=4),
        "fast_4": offload.run(preset="fast", batch_size=4),
        "fast_hf_32": offload.run(NO_KERNELS, preset="fast", batch_size=32),
        "fast_32": offload.run(preset="fast", batch_size=32),
        "floor_ratios": [fast["latency_s"] / fast["floor_s"] for _, fast in presets(offload)],
        "host_rates": [run["floor"]["host_memory_bytes_per_s"] for pair in presets(offload) for run in pair],
        "lever_first": h200.run(preset="seed"),
        "lever_bf16": h200.run(preset="seed", dtype="bf16"),
        "lever_fast": h200.run(preset="fast"),
        "lever_states": h200.run(preset="fast", optimizer_states="bf16"),
        # Bytes that each logit adds to the peak without FLCE, then and now.
        "bytes_a_logit_then": ((hf_8 - hf_4) / 4 - checkpoints) / logits,
        "bytes_a_logit_now": ((seed_32 - seed_4) / 28 - checkpoints) / logits,
    }


def _documents(studies: Sequence[Study]) -> dict[str, Any]:
    return {
        "predictions": report_tables.errors(evidence.predictions()),
        "study": [part for part in studies if not part.is_limited],
        "studies": studies,
        "repeats": evidence.repeats(studies),
        "study_errors": evidence.study_errors(),
        "verdicts": evidence.verdicts(),
        "two_gpus": evidence.folder("h100_two_gpus").records,
        "batches": study.BATCH_SIZES,
        "lengths": study.SEQ_LENGTHS,
        "cells": len(study.GRID),
        "seed_study": evidence.study_with(original.OFFLOAD["seed"], studies),
        "gpu_study": evidence.study_with(RunConfig(), studies),
        "tables": report_tables,
        "measured": tables.load_all(evidence.DATA, None),
        "setting_words": setting_words,
        "config_of": config_of,
        "holds": evidence.holds,
        "NO_KERNELS": NO_KERNELS,
    }
