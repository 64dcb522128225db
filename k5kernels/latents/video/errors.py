"""The error of video files."""


class VideoError(ValueError):
    """A file that is not a video we can use, or one we cannot write; the message says what would do."""
