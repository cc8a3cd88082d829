"""Images: from the address in a task to an RGB image in memory.

Begin with `decoding.py`: `ImageLoader.load` is what workers and commands call.

- `decoding`: bytes -> an upright RGB image within the pixel limit; the only place where task images are decoded.
- `sources`: an address (`http(s)://`, `data:`, a path on Label Studio, cloud storage, a mounted folder) -> bytes.
- `safe_http`: a requests session that connects to public addresses and allowed hosts only (SSRF protection).
- `thumbnails`: small copies of some of the loaded images, for the status page.

May import `labelstudio` and the modules beside the packages (metrics, settings, errors); never torch or Redis.
"""
