"""Videos to latents on the disk, and from there to batches.

``encode`` writes safetensors shards with an index, ``validate`` reads all of it, ``LatentDataset`` and ``LatentLoader``
hand it to a training that can be stopped and resumed at any clip.
"""

from prfl_fast.training.data.batch import Batch
from prfl_fast.training.data.dataset import LatentDataset
from prfl_fast.training.data.loader import BadDataWarning, LatentLoader
from prfl_fast.training.data.published import PublishedOptions
from prfl_fast.training.data.sampler import BucketBatchSampler

__all__ = ["BadDataWarning", "Batch", "BucketBatchSampler", "LatentDataset", "LatentLoader", "PublishedOptions"]
