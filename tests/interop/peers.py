"""Runs in the peers' own environment: their classes write files, their loaders read ours.

``peers.py write OUT`` makes a folder a case, and ``<case>.safetensors`` (x, latents,
reconstruction) beside it; ``peers.py read OUT`` loads what we wrote into ``OUT/<case>`` and
leaves ``answer.safetensors`` there.
"""

import json
import sys
from pathlib import Path

D, F, K, GROUPS = 12, 40, 5, [8, 12, 20]
SCALE = 0.37


def inputs():
    import torch

    return 3 * torch.randn(64, D, generator=torch.Generator().manual_seed(7)) + 1


def randomise(module, seed):
    """Weights without any structure, so that no transposition or missing bias goes unseen."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            positive = name == "threshold"
            parameter.copy_(0.5 + noise.abs() if positive else 0.4 * noise)
    return module


def record(folder, x, latents, reconstruction):
    from safetensors.torch import save_file

    values = {"x": x, "latents": latents, "reconstruction": reconstruction}
    values = {name: value.detach().contiguous().clone() for name, value in values.items()}
    save_file(values, folder.parent / f"{folder.name}.safetensors")


def write_dictionary_learning(out):
    import torch
    from dictionary_learning.dictionary import AutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from dictionary_learning.utils import load_dictionary

    made = {
        "matryoshka": MatryoshkaBatchTopKSAE(D, F, K, GROUPS),
        "matryoshka_unset": MatryoshkaBatchTopKSAE(D, F, K, GROUPS),
        "matryoshka_scaled": MatryoshkaBatchTopKSAE(D, F, K, GROUPS),
        "batch_top_k": BatchTopKSAE(D, F, K),
        "top_k": AutoEncoderTopK(D, F, K),
        "standard": AutoEncoder(D, F),
        "jumprelu": JumpReluAutoEncoder(D, F),
    }
    for seed, (name, ae) in enumerate(made.items()):
        randomise(ae, seed)
        if hasattr(ae, "k") and name != "matryoshka_unset":
            ae.threshold.fill_(0.8)
        folder = out / f"dictionary_learning.{name}"
        folder.mkdir()
        torch.save(ae.state_dict(), folder / "ae.pt")
        trainer = {
            "dict_class": type(ae).__name__,
            "activation_dim": D,
            "dict_size": F,
            "layer": 3,
            "lm_name": "a-model",
            "submodule_name": "resid_post_layer_3",
        }
        if hasattr(ae, "k"):
            trainer["k"] = K
        config = {"trainer": trainer, "buffer": {"ctx_len": 128, "io": "out"}}
        (folder / "config.json").write_text(json.dumps(config))
        loaded, _ = load_dictionary(str(folder), "cpu")
        if name.endswith("_scaled"):
            loaded.scale_biases(1 / SCALE)
        x = inputs()
        latents = loaded.encode(x)
        record(folder, x, latents, loaded.decode(latents))


def write_sae_lens(out):
    import torch
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.sae import SAE, SAEMetadata
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    def metadata():
        return SAEMetadata(model_name="a-model", hook_name="blocks.3.hook_resid_post")

    shape = {"d_in": D, "d_sae": F}
    scaled = {"normalize_activations": "expected_average_only_in"}
    widths = [8, 20, 40]
    made = {
        "standard": StandardSAE(StandardSAEConfig(**shape)),
        "standard_scaled": StandardSAE(StandardSAEConfig(**shape, **scaled)),
        "jumprelu": JumpReLUSAE(JumpReLUSAEConfig(**shape)),
        "jumprelu_unsubtracted": JumpReLUSAE(
            JumpReLUSAEConfig(**shape, apply_b_dec_to_input=False)
        ),
        "jumprelu_scaled": JumpReLUSAE(
            JumpReLUSAEConfig(**shape, apply_b_dec_to_input=False, **scaled)
        ),
        "topk": TopKSAE(TopKSAEConfig(**shape, k=K)),
        "topk_rescaled": TopKSAE(TopKSAEConfig(**shape, k=K, rescale_acts_by_decoder_norm=True)),
        "topk_rescaled_scaled": TopKSAE(
            TopKSAEConfig(**shape, k=K, rescale_acts_by_decoder_norm=True, **scaled)
        ),
    }
    trained = {
        "batchtopk": BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape, k=K)),
        "matryoshka": MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(**shape, k=K, matryoshka_widths=widths)
        ),
        "matryoshka_checkpoint": MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(**shape, k=K, matryoshka_widths=widths)
        ),
    }
    for seed, (name, sae) in enumerate((made | trained).items()):
        randomise(sae, 20 + seed)
        sae.cfg.metadata.model_name = metadata().model_name
        sae.cfg.metadata.hook_name = metadata().hook_name
        folder = out / f"sae_lens.{name}"
        if name in trained:
            sae.topk_threshold = torch.tensor(0.9, dtype=torch.double)
            if name.endswith("checkpoint"):
                sae.save_model(folder)
                inference = out.parent / "inference"
                sae.save_inference_model(inference)
                loaded = SAE.load_from_disk(inference)
            else:
                sae.save_inference_model(folder)
                loaded = SAE.load_from_disk(folder)
        else:
            sae.save_model(folder)
            loaded = SAE.load_from_disk(folder)
        if name.endswith("_scaled"):
            loaded.fold_activation_norm_scaling_factor(SCALE)
        x = inputs()
        latents = loaded.encode(x)
        record(folder, x, latents, loaded.decode(latents))


def write_sparsify(out):
    import torch
    from sparsify import SparseCoder, SparseCoderConfig

    sae = randomise(SparseCoder(D, SparseCoderConfig(num_latents=F, k=K)), 50)
    folder = out / "sparsify.top_k" / "layers.3"
    sae.save_to_disk(folder)
    x = inputs()
    values, indices, _ = SparseCoder.load_from_disk(folder).encode(x)
    latents = torch.zeros(len(x), F).scatter(1, indices, values)
    record(folder.parent, x, latents, sae.decode(values, indices))


def write_gemma_scope(out):
    """Nobody's writer is public; SAELens' loader says what the arrays mean."""
    import numpy as np
    import sae_lens.loading.pretrained_sae_loaders as loaders
    import torch
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

    folder = out / "gemma_scope.params"
    folder.mkdir()
    generator = torch.Generator().manual_seed(60)
    arrays = {
        "W_enc": 0.4 * torch.randn(D, F, generator=generator),
        "W_dec": 0.4 * torch.randn(F, D, generator=generator),
        "b_enc": torch.randn(F, generator=generator),
        "b_dec": torch.randn(D, generator=generator),
        "threshold": 1 + torch.rand(F, generator=generator),
    }
    np.savez(folder / "params.npz", **{name: value.numpy() for name, value in arrays.items()})
    loaders.hf_hub_download = lambda **kwargs: str(folder / "params.npz")
    place = "layer_3/width_16k/average_l0_5"
    cfg, state, _ = loaders.gemma_2_sae_huggingface_loader("google/gemma-scope-2b-pt-res", place)
    subtract = cfg["apply_b_dec_to_input"]
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D, d_sae=F, apply_b_dec_to_input=subtract))
    sae.load_state_dict(state)
    x = inputs()
    latents = sae.encode(x)
    record(folder, x, latents, sae.decode(latents))


def read(out):
    import torch
    from dictionary_learning.utils import load_dictionary
    from sae_lens.saes.sae import SAE
    from safetensors.torch import load_file, save_file
    from sparsify import SparseCoder

    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        x = load_file(folder / "x.safetensors")["x"]
        kind = folder.name.split(".")[0]
        if kind == "sparsify":
            sae = SparseCoder.load_from_disk(folder / "sae")
            values, indices, _ = sae.encode(x)
            latents = torch.zeros(len(x), sae.num_latents).scatter(1, indices, values)
            reconstruction = sae.decode(values, indices)
        else:
            if kind == "dictionary_learning":
                sae, _ = load_dictionary(str(folder / "sae"), "cpu")
            else:
                sae = SAE.load_from_disk(folder / "sae")
            latents = sae.encode(x)
            reconstruction = sae.decode(latents)
        values = {"latents": latents, "reconstruction": reconstruction}
        values = {name: value.detach().contiguous().clone() for name, value in values.items()}
        save_file(values, folder / "answer.safetensors")


def delphi_results(out):
    """delphi's own loaders on our explanations and scores, and files by its own code in turn."""
    import asyncio
    import importlib.util
    import types
    from dataclasses import asdict

    found = importlib.util.find_spec("delphi")
    if found is None:
        (out / "answer.json").write_text(json.dumps(None))
        return
    # The packages' __init__ want vLLM and more; what is needed here does not.
    root = Path(found.submodule_search_locations[0])
    for name in ("latents", "explainers", "scorers", "scorers.classifier", "clients", "log"):
        package = types.ModuleType(f"delphi.{name}")
        package.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[f"delphi.{name}"] = package
    stubs = {"aiofiles": {"open": Opened}, "orjson": {"loads": json.loads}, "blobfile": {}}
    stubs["orjson"]["JSONDecodeError"] = ValueError
    for name, members in stubs.items():
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(members)
    latents = importlib.import_module("delphi.latents.latents")
    for name in ("ActivatingExample", "NonActivatingExample", "LatentRecord", "Latent"):
        setattr(sys.modules["delphi.latents"], name, getattr(latents, name))
    explainer = importlib.import_module("delphi.explainers.explainer")
    analysis = importlib.import_module("delphi.log.result_analysis")
    sample = importlib.import_module("delphi.scorers.classifier.sample")
    record = latents.LatentRecord(latents.Latent("layers.1", 3))
    loaded = asyncio.run(explainer.explanation_loader(record, str(out / "ours/explanations")))
    table, _ = analysis.load_data(out / "ours/scores", ["layers.1"])
    answer = {"explanation": loaded.explanation, "accuracy": {}}
    for kind, rows in table.groupby("score_type"):
        confusion = analysis.compute_confusion(rows)
        metrics = analysis.compute_classification_metrics(confusion)
        answer["accuracy"][kind] = float(metrics["accuracy"])
    theirs = out / "theirs"
    (theirs / "scores" / "detection").mkdir(parents=True)
    (theirs / "explanations").mkdir()
    (theirs / "explanations" / f"{record.latent}.txt").write_text(json.dumps("left effusion"))
    made = [(True, True, 0.9), (True, False, 0.4), (False, False, 0.1), (False, None, None)]
    examples = [
        sample.ClassifierOutput(["a"], [0.0], 1, truth, said, p, None if said is None else said)
        for truth, said, p in made
    ]
    path = theirs / "scores/detection" / f"{record.latent}.txt"
    path.write_text(json.dumps([asdict(one) for one in examples]))
    (out / "answer.json").write_text(json.dumps(answer))


class Opened:
    """aiofiles, as far as a loader of one file needs it."""

    def __init__(self, path, mode="r"):
        self.file = open(path, mode)  # noqa: PTH123, SIM115

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        self.file.close()

    async def read(self):
        return self.file.read()


if __name__ == "__main__":
    command, where = sys.argv[1], Path(sys.argv[2])
    if command == "delphi":
        delphi_results(where)
    elif command == "write":
        where.mkdir()
        write_dictionary_learning(where)
        write_sae_lens(where)
        write_sparsify(where)
        write_gemma_scope(where)
    else:
        read(where)
