"""The procedural world as a source."""

from fixclip_core.data.config import DataConfig
from fixclip_core.data.samples import Sample

NAMES = ("scenes", "scenes-references", "scenes-mixed")


class SceneSource:
    """Procedural scenes, drawn when they are read; scene number i of a seed is always the same.

    The long captions of `scenes` describe one object after the other; those of `scenes-references` also give an
    object's properties by pointing to another sentence, see fixclip_core/scenes/references.py, and come with a plain
    wording. In `scenes-mixed` the two kinds take turns.
    """

    remote = False

    def __init__(self, config: DataConfig) -> None:
        self.name, colon, number = config.source.partition(":")
        if colon and not (number.isdecimal() and int(number)):
            raise ValueError(f"source {config.source!r}: give the number of scenes, like {self.name}:200")
        stop = int(number) if number else config.stop
        if stop is None:
            raise ValueError(f"source {self.name!r} is endless: name their number, like {self.name}:200, or set `stop`")
        self.seed, self.sizes = 0, [stop]

    def read(self, index: int) -> Sample:
        from fixclip_core import scenes

        if self.name == "scenes-references" or (self.name == "scenes-mixed" and index % 2):
            scene, long = scenes.reference_at(self.seed, index if self.name == "scenes-references" else index // 2)
        else:
            scene = scenes.scene_at(self.seed, index)
            long = scenes.long_caption(scene, index)
        short = scenes.short_caption(scene, index).text
        extra = {} if long.plain is None else {"plain": long.plain}
        return Sample(self.name, str(index), scenes.render(scene), long.text, short, extra)

    def fingerprint(self, index: int) -> str:
        return f"{self.name}/{self.seed}/{index}"
