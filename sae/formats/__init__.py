"""Dictionaries of other libraries: reading, writing, and telling the formats apart.

==================== ============================== ==== =====
format               files                          read write
==================== ============================== ==== =====
maira_sae            manifest.json, sae.safetensors yes  yes
dictionary_learning  ae.pt, config.json             yes  yes
sae_lens             sae_weights.safetensors, cfg   yes  yes
sparsify             sae.safetensors, cfg.json      yes  yes
gemma_scope          params.npz                     yes  no
inspected            anything with readable names   yes  no
==================== ============================== ==== =====

A dictionary read here takes raw activations, whatever its library fed it. Where the file's
weights expect ``x · s`` they are folded the way their own library folds them, so that latents
are equal to that library's: dictionary_learning scales biases and threshold (latents in raw
units), SAELens scales the weights (latents in scaled units). ``config.origin["folded"]`` says
which. A scale that is needed and not in the files is an error that asks for ``norm_scale``.
"""

from sae.formats.convert import WRITERS, convert
from sae.formats.given import Given
from sae.formats.read import FORMATS, read

__all__ = ["FORMATS", "WRITERS", "Given", "convert", "read"]
