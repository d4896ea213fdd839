"""SAELens' side of `maira-sae bench store` and `bench harvest`; runs in its own environment.

    python bench_peer.py {store,harvest} '{…}'

Every line of standard input is answered with a JSON object: rows or tokens, and seconds. Imports
nothing of this library.
"""

# pyright: reportMissingImports=false
import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch

HOOK = "model.layers.{}"


def drop_cache(folder):
    for path in Path(folder).rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def store(settings):
    """Batches of cached activations from `ActivationsStore`, written as its runner writes them."""
    from datasets import Array2D, Dataset, Features, concatenate_datasets
    from sae_lens.training.activations_store import ActivationsStore

    context, width, rows = settings["context"], settings["d_model"], settings["rows"]
    folder = Path(settings["folder"])
    features = Features({"hook": Array2D(shape=(context, width), dtype="float32")})
    generator = torch.Generator().manual_seed(0)
    shards = []
    for _ in range(8):
        sequences = rows // 8 // context
        values = torch.randn(sequences, context, width, generator=generator)
        shards.append(Dataset.from_dict({"hook": values.numpy()}, features=features))
    concatenate_datasets(shards).save_to_disk(str(folder))
    del shards

    def turn(cold):
        if cold:
            drop_cache(folder)
        batches = ActivationsStore(
            model=None,
            dataset=None,
            streaming=False,
            hook_name="hook",
            hook_head_index=None,
            context_size=context,
            d_in=width,
            n_batches_in_buffer=settings["buffer_rows"] // context,
            total_training_tokens=rows,
            store_batch_size_prompts=32,
            train_batch_size_tokens=settings["batch"],
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
            cached_activations_path=str(folder),
        )
        # Its buffer keeps half of the rows back; a quarter of an epoch stays clear of the end.
        count = max(1, rows // 4 // settings["batch"])
        began = time.perf_counter()
        for _ in range(count):
            batches.next_batch()
        return {"rows": count * settings["batch"], "seconds": time.perf_counter() - began}

    def both():
        cold, warm = turn(True), turn(False)
        return {"cold": cold, "warm": warm}

    return both


def harvest(settings):
    """`CacheActivationsRunner` on the text tower and the same words, in one context size."""
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
    from safetensors.torch import load_file

    tokens = load_file(settings["tokens"])["words"]
    context = settings["context"]
    batch = max(1, settings["batch_tokens"] // context)
    whole = len(tokens) // (context * batch) * context * batch
    sequences = tokens[:whole].view(-1, context)
    out = Path(settings["out"])
    config = CacheActivationsRunnerConfig(
        dataset_path="given",
        model_name=settings["model"],
        model_class_name="AutoModelForCausalLM",
        model_batch_size=batch,
        hook_name=HOOK.format(settings["layer"]),
        d_in=settings["d_model"],
        training_tokens=whole,
        context_size=context,
        new_cached_activations_path=str(out),
        shuffle=False,
        prepend_bos=False,
        streaming=False,
        device="cuda" if torch.cuda.is_available() else "cpu",
        buffer_size_gb=(whole // 4 + context * batch) * settings["d_model"] * 4 / 1e9,
    )

    def turn():
        shutil.rmtree(out, ignore_errors=True)
        dataset = Dataset.from_dict({"input_ids": sequences.tolist()})
        runner = CacheActivationsRunner(config, override_dataset=dataset)
        began = time.perf_counter()
        made = runner.run()
        return {"tokens": len(made) * context, "seconds": time.perf_counter() - began}

    return turn


if __name__ == "__main__":
    task, given = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(given["threads"])
    answers, sys.stdout = sys.stdout, sys.stderr  # peers print
    run = {"store": store, "harvest": harvest}[task](given)
    for _ in sys.stdin:
        answers.write(json.dumps(run()) + "\n")
        answers.flush()
