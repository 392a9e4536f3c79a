"""The procedural world as a source."""

from fixclip_core.data.config import DataConfig
from fixclip_core.data.samples import Sample


class SceneSource:
    """Procedural scenes, drawn when they are read; scene number i of a seed is always the same."""

    remote = False

    def __init__(self, config: DataConfig) -> None:
        if config.stop is None:
            raise ValueError("source 'scenes' is endless: set `stop` to the number of scenes to use")
        self.seed, self.sizes = 0, [config.stop]

    def read(self, index: int) -> Sample:
        from fixclip_core import scenes

        scene = scenes.scene_at(self.seed, index)
        long, short = scenes.long_caption(scene, index), scenes.short_caption(scene, index)
        return Sample("scenes", str(index), scenes.render(scene), long.text, short.text)

    def fingerprint(self, index: int) -> str:
        return f"scenes/{self.seed}/{index}"
