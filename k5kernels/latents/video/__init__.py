"""Video files in and out: what a player shows becomes the frames that are encoded."""

from k5kernels.latents.video.buckets import BUCKETS, Bucket, buckets_of, nearest_bucket
from k5kernels.latents.video.clips import MIN_FRAMES, Clip, read_clips
from k5kernels.latents.video.errors import VideoError
from k5kernels.latents.video.frames import fit, to_frames, to_model
from k5kernels.latents.video.read import VideoInfo, decode, probe, read_video
from k5kernels.latents.video.reading import AS_MODELS, EVERY_FRAME, Reading, parse_colour, parse_fps
from k5kernels.latents.video.write import write_video

__all__ = [
    "AS_MODELS",
    "BUCKETS",
    "EVERY_FRAME",
    "MIN_FRAMES",
    "Bucket",
    "Clip",
    "Reading",
    "VideoError",
    "VideoInfo",
    "buckets_of",
    "decode",
    "fit",
    "nearest_bucket",
    "parse_colour",
    "parse_fps",
    "probe",
    "read_clips",
    "read_video",
    "to_frames",
    "to_model",
    "write_video",
]
