"""Text to video, ready to be trained."""

from typing import Any

from diffnext.models.parameters import freeze
from diffnext.pipelines.nova_pipeline import NOVAPipeline


class NOVATrainT2VPipeline(NOVAPipeline):
    """A pipeline whose transformer learns what text-to-video training changes; the rest of it is frozen."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        freeze(self.transformer.train(), "t2v")
