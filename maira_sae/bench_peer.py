"""SAELens' side of `maira-sae bench store` and `bench harvest`, and delphi's of `bench collect`.

Runs in an environment of its own.

    python bench_peer.py {store,harvest,collect} '{…}'

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


def collect(settings):
    """delphi's `LatentCache` over a model whose hooked module gives back the stored rows."""
    import importlib.util
    import types

    # The package's own `__init__` asks for vLLM's and faiss' company; the cache needs neither.
    found = importlib.util.find_spec("delphi")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("there is no delphi here; build the environment anew")
    package = types.ModuleType("delphi.latents")
    package.__path__ = [str(Path(found.submodule_search_locations[0]) / "latents")]
    sys.modules["delphi.latents"] = package
    from delphi.latents.cache import LatentCache
    from safetensors.torch import load_file

    weights = load_file(settings["weights"])
    parts = [load_file(path)[settings["site"]] for path in settings["parts"]]
    rows, context = torch.cat(parts), settings["context"]
    out = Path(settings["out"])

    class Rows(torch.nn.Module):
        """Stands where a layer would: looks the rows up."""

        def forward(self, places):
            return rows[places]

    class Stored(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.layer = Rows()

        def forward(self, places):
            return self.layer(places)

    def encode(x):
        pre = (x.float() - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
        return pre * (pre > weights["threshold"].clamp(min=0))

    whole = len(rows) // (context * settings["sequences"]) * context * settings["sequences"]
    places = torch.arange(whole).view(-1, context)

    def turn():
        shutil.rmtree(out, ignore_errors=True)
        began = time.perf_counter()
        cache = LatentCache(Stored(), {"layer": encode}, settings["sequences"])
        cache.run(whole, places)
        cache.save_splits(settings["splits"], out)
        return {"rows": whole, "seconds": time.perf_counter() - began}

    return turn


if __name__ == "__main__":
    task, given = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(given["threads"])
    answers, sys.stdout = sys.stdout, sys.stderr  # peers print
    run = {"store": store, "harvest": harvest, "collect": collect}[task](given)
    for _ in sys.stdin:
        answers.write(json.dumps(run()) + "\n")
        answers.flush()
