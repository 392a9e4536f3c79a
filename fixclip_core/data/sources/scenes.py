"""The procedural world as a source."""

from fixclip_core.data.config import DataConfig
from fixclip_core.data.samples import Sample


class SceneSource:
    """Procedural scenes, drawn when they are read; scene number i of a seed is always the same."""

    remote = False

    def __init__(self, config: DataConfig) -> None:
        number = config.source.removeprefix("scenes").removeprefix(":")
        if number and not (number.isdecimal() and int(number)):
            raise ValueError(f"source {config.source!r}: give the number of scenes, like scenes:200")
        stop = int(number) if number else config.stop
        if stop is None:
            raise ValueError("source 'scenes' is endless: name their number, like scenes:200, or set `stop`")
        self.seed, self.sizes = 0, [stop]

    def read(self, index: int) -> Sample:
        from fixclip_core import scenes

        scene = scenes.scene_at(self.seed, index)
        long, short = scenes.long_caption(scene, index), scenes.short_caption(scene, index)
        return Sample("scenes", str(index), scenes.render(scene), long.text, short.text)

    def fingerprint(self, index: int) -> str:
        return f"scenes/{self.seed}/{index}"
