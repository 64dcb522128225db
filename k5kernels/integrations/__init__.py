"""The library inside other people's pipelines."""
