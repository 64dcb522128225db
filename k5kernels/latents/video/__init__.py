"""Video files in and out: what a player shows becomes the frames that are encoded."""

from k5kernels.latents.video.buckets import BUCKETS, nearest_bucket
from k5kernels.latents.video.errors import VideoError
from k5kernels.latents.video.frames import fit, to_frames, to_model
from k5kernels.latents.video.read import VideoInfo, decode, probe, read_video
from k5kernels.latents.video.write import write_video

__all__ = [
    "BUCKETS",
    "VideoError",
    "VideoInfo",
    "decode",
    "fit",
    "nearest_bucket",
    "probe",
    "read_video",
    "to_frames",
    "to_model",
    "write_video",
]
