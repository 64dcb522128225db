"""Videos to latents: reading video files, the shards that hold latents, and the job that encodes (§6.1, §7.1)."""
