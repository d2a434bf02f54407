"""How the gain of a larger tier is predicted, and whose answers are read first."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from tandem_operator.resources.base import Duration, Resource

Source = Annotated[
    str,
    StringConstraints(
        pattern=r"^((file|pvc|configmap)://|image:///)[^\s]{1,1000}$", min_length=8, max_length=1024
    ),
]
# Directories of models are too large for a ConfigMap.
DirectorySource = Annotated[
    str,
    StringConstraints(
        pattern=r"^((file|pvc)://|image:///)[^\s]{1,1000}$", min_length=8, max_length=1024
    ),
]


class Training(Resource):
    """Train the predictor from measured outcomes."""

    data: Source = Field(
        description="JSON lines (plain or .gz) of prompts and the quality of each tier: "
        "configmap://name/key, pvc://claim/path, image:///path (inside the router image), "
        "file:///path (on the node) or, in local mode, file://./path."
    )
    from_labels: bool = Field(
        default=False,
        description="Train again from data and what labels hold of prompts (learning.capture: "
        "Prompts or Features); a new predictor is scored beside the old one and takes over where "
        "it proves better.",
    )
    every: Duration = Field(
        default="24h", description="With fromLabels: least time between two trainings."
    )
    min_labels: int = Field(
        default=500,
        ge=50,
        le=100_000,
        description="With fromLabels: new labels that a training needs, a count.",
    )


class Predictor(Resource):
    """How the gain of the larger tier is predicted for a prompt."""

    type: Literal["Learned", "Length", "Fixed"] | None = Field(
        default=None,
        description="Learned: from outcomes, what artifact or training mean; with neither, and "
        "learning on, prompt length ranks until there is one. Length: longer prompts are harder. "
        "Fixed: always the fallback tier. When absent: Learned with artifact or training, else "
        "Length.",
    )
    artifact: Source | None = Field(
        default=None,
        description="A trained predictor: configmap://name, pvc://claim/dir, image:///dir (inside "
        "the router image), file:///dir (on the node) or, in local mode, file://./dir.",
    )
    embedding: DirectorySource | None = Field(
        default=None,
        description="The model directory that the artifact was trained with (tandem train "
        "--embedding): pvc://claim/dir, image:///dir (inside the router image), file:///dir (on "
        "the node) or, in local mode, file://./dir. Without it that view is off.",
    )
    training: Training | None = Field(
        default=None, description="Train one before use; the router answers meanwhile."
    )
    deadline: Duration = Field(
        default="20ms", description="A prediction later than this means the fallback tier."
    )

    @property
    def kind(self) -> Literal["Learned", "Length", "Fixed"]:
        """The type, with what artifact or training imply."""
        return self.type or ("Learned" if self.has_source else "Length")

    @property
    def has_source(self) -> bool:
        """Whether there is, or will be, something learned."""
        return self.artifact is not None or self.training is not None

    @property
    def ranks_by(self) -> Literal["Learned", "Length", "Fixed"]:
        """What scores prompts: the kind, but prompt length while Learned has nothing learned."""
        return "Length" if self.kind == "Learned" and not self.has_source else self.kind


class Cascade(Resource):
    """Reading the cheaper tier's answer before it is sent, where the prompt leaves it open."""

    streams: bool = Field(
        default=False,
        description="Also for requests with stream: true; their first token then waits for the "
        "cheaper tier's whole answer.",
    )
    deadline: Duration = Field(
        default="250ms",
        description="A verdict on an answer later than this does not count, and the answer is "
        "sent. A judge that is asked too has 3s where this is less.",
    )
