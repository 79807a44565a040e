"""Everything that looks at images: the feature extractor, the classifier, CLIP and the perceptual similarity, opened
once, before any image is drawn, so that missing weights are known first.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from noisycond.data.annotation import SAM_FACT, Segmenter
from noisycond.data.sources import ImageSource
from noisycond.errors import require
from noisycond.evaluation.agreement import ClipScore, prompts_for
from noisycond.evaluation.classifiers import Classifier, open_classifier
from noisycond.evaluation.control import Obedience
from noisycond.evaluation.extraction import extract_features, extract_in_memory, read_batches, size_of
from noisycond.evaluation.extractors import Extractor, open_extractor, open_similarity
from noisycond.evaluation.features import Features
from noisycond.evaluation.images import Resize, read_image
from noisycond.evaluation.options import MetricArguments
from noisycond.evaluation.segments import segment
from noisycond.evaluation.suite import Evidence, families_of, match_labels, of_controls


logger = logging.getLogger(__name__)


@dataclass
class Instruments:
    """What the asked-for metrics look through; None where none of them needs it."""

    extractor: Extractor
    classifier: Classifier | None = None
    clip: ClipScore | None = None
    similarity: torch.nn.Module | None = None
    segmenter: Segmenter | None = None

    @classmethod
    def open(
        cls, options: MetricArguments, embedded: bool, device: torch.device, segments: bool = True
    ) -> "Instruments":
        """Opens what the options name.

        Args:
            embedded: whether the images are digits, whose extractor, classifier and similarity ship. segments:
                whether there are controls that only a segmenter can be compared with.

        Raises:
            InputError: weights are missing, or a name is unknown.
        """
        families = families_of(options.metrics)
        name = options.feature_extractor or ("digits" if embedded else "inception-v3-compat")
        ships = name == "digits"
        extractor = open_extractor(name, options.extractor_weights, device)
        classifier_name = options.classifier or ("digits" if ships else None)
        similarity_name = options.lpips_similarity or ("lpips-digits" if ships else None)
        asked = "lpips" in families and similarity_name is not None
        segments = segments and "control_masks" in families and options.sam_model is not None
        return cls(
            extractor,
            open_classifier(classifier_name, device) if "class_agreement" in families and classifier_name else None,
            ClipScore(options.clip_model, device=device) if "clip_score" in options.metrics else None,
            open_similarity(similarity_name, device) if asked else None,
            Segmenter(options.annotation, device) if segments else None,
        )

    def check_segmenter(self, made_with: Sequence[Mapping[str, object]]) -> None:
        """Warns where controls were segmented by another model.

        Args:
            made_with: of each set of controls; see [`noisycond.control_set.ControlSet`].
        """
        own = None if self.segmenter is None else self.segmenter.fingerprint
        if own is not None and any(made.get(SAM_FACT, own) != own for made in made_with):
            logger.warning(
                "--sam_model is another than the controls were made with: what obeys them wholly will not score 1."
            )

    @property
    def classifies_itself(self) -> bool:
        """Whether the extractor's logits are those of the classifier, so that one pass gives both."""
        return self.classifier is not None and self.classifier.weights == self.extractor.weights_hash

    def foreseen(
        self,
        options: MetricArguments,
        real,
        train,
        labelled: bool,
        named: bool,
        texts: bool = False,
        controls=None,
    ) -> set[str]:
        """What of the needs of the metrics will be here, before an image is drawn.

        Args:
            real, train: real images, opened, or None. labelled: whether generated images will have labels; named:
                whether their classes will have names; texts: whether they will have texts.
            controls: what they are drawn after, of which only `annotator` is looked at; None without.
        """
        fitted = real if options.rmd_fit == "reference" else train
        has_spatial = self.extractor.layers.spatial is not None
        here = {
            "reference": real is not None,
            "reference moments": real is not None,
            "reference features": real is not None,
            "spatial": has_spatial and real is not None,
            "logits": self.extractor.layers.logits is not None,
            "labels": labelled,
            "fit": fitted is not None,
            # A file tells when it is read.
            "fit labels": fitted is not None and (fitted.source is None or fitted.source.labels is not None),
            "train": train is not None,
            "train features": train is not None,
            "classifier": self.classifier is not None,
            "clip": self.clip is not None,
            "texts": texts or (labelled and named),
            "similarity": self.similarity is not None,
        }
        known = set() if controls is None else of_controls(controls.annotator, self.segmenter is not None)
        return {need for need, is_here in here.items() if is_here} | known

    def settings(self) -> dict:
        """The choices, as JSON values, for what is printed with the results."""
        chosen = {"extractor": self.extractor.settings()}
        if self.classifier is not None:
            chosen["classifier"] = self.classifier.settings()
        if self.clip is not None:
            chosen["clip"] = self.clip.settings()
        if self.similarity is not None:
            chosen["lpips_similarity"] = self.similarity.get_name()
        if self.segmenter is not None:
            chosen["segmenter"] = self.segmenter.fingerprint
        return chosen


@dataclass
class Extraction:
    """How sets of images are turned into evidence.

    Attributes:
        resize: of real images. Generated ones are resized only where --resolution asks for it: else they have this
            size, or are refused.
        device: where distances are computed. folder: where features are kept, beside a folder of segmentations; None
            keeps them in memory.
        accelerator: the processes that share the work; needed with a folder.
        batch_size: images per pass. workers: processes that read images; 0 reads in this one.
    """

    instruments: Instruments
    options: MetricArguments
    resize: Resize
    device: torch.device
    folder: Path | None = None
    accelerator: Accelerator | None = None
    batch_size: int = 50
    workers: int = 0

    def settings(self) -> dict:
        """What decides values beside images and options, as JSON values."""
        return self.instruments.settings() | {
            "resolution": self.resize.resolution,
            "resized": self.options.resolution is not None,
            "batch_size": self.batch_size,
        }

    def statistics_settings(self) -> dict:
        """What statistics of real images must share with the images they are compared with."""
        resize = {"resolution": self.resize.resolution, "interpolation": self.resize.interpolation}
        return self.instruments.extractor.settings() | resize

    def features(self, option: str, source: ImageSource, wanted: Sequence[str] | None = None) -> Features:
        """The extractor's features of all images of a set: those that are wanted, by default all that metrics of
        generated images need."""
        families, extractor = families_of(self.options.metrics), self.instruments.extractor
        if wanted is None:
            wanted = ["pooled"]
            wanted += ["logits"] if "inception_score" in families or self.instruments.classifies_itself else []
            wanted += ["spatial"] if "sfid" in families else []
        return self._extract(option, source, extractor, extractor.settings(), wanted)

    def evidence(self, option: str, source: ImageSource) -> Evidence:
        """What the metrics of a set of generated images are computed from, but for the reference."""
        if self.options.resolution is None and self.resize.resolution is not None:
            return replace(self, resize=Resize()).evidence(option, source)
        features, instruments = self.features(option, source), self.instruments
        evidence = Evidence(features, source.class_names, source.texts, similarity=instruments.similarity)
        evidence.device = self.device
        labels, classifier = features.labels, instruments.classifier
        if labels is not None and source.class_names is not None:
            match_labels(labels, source.class_names, None, option)  # each has a name
        if classifier is not None and labels is not None:
            settings = {"classifier": classifier.settings()}
            evidence.class_logits = (
                features.logits
                if instruments.classifies_itself
                else self._extract(option, source, classifier, settings, ["logits"]).logits
            )
            evidence.class_targets = match_labels(
                labels, source.class_names, classifier.class_names, f"--classifier {classifier.name}"
            )
        if instruments.clip is not None and (source.texts or (labels is not None and source.class_names)):
            evidence.clip_scores = self._clip_scores(option, source, instruments.clip, labels)
        if instruments.similarity is not None:
            size = size_of(option, source, self.resize)
            evidence.pixels = lambda numbers: next(read_batches(option, source, self.resize, size, [numbers]))[1]
        if source.controls is not None:
            evidence.obedience = self._obedience(option, source)
        return evidence

    def _obedience(self, option: str, source: ImageSource) -> Obedience:
        """With segmentations of the images where the metrics want them."""
        segmenter = self.instruments.segmenter
        seen = Obedience(source.controls, lambda number: read_image(option, source, number, Resize()), segmenter)
        if segmenter is None or self.folder is None or source.controls.annotator != "sam":
            return seen
        settings = {"segmenter": segmenter.fingerprint, **segmenter.options}
        folder = self.folder.with_name("segments")
        return replace(seen, annotate=segment(source, seen, segmenter, settings, folder, self.accelerator))

    def _clip_scores(
        self, option: str, source: ImageSource, clip: ClipScore, labels: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Of each image with its own text, or, where it has none, with the prompt of its class: float32 [N]. On the
        main process, which alone computes metrics; None on others."""
        embedded = self._extract(option, source, clip.extract, {"clip": clip.settings()}, ["pooled"]).pooled
        if self.accelerator is not None and not self.accelerator.is_main_process:
            return None
        if source.texts is not None:
            return clip.compare(embedded, clip.embed_each(source.texts))
        classes = torch.arange(len(source.class_names))
        prompts = clip.embed_texts(prompts_for(source.class_names, classes, self.options.clip_prompt))
        return clip.compare(embedded, prompts[labels])

    def _extract(self, option: str, source: ImageSource, extract, settings: dict, wanted: Sequence[str]) -> Features:
        if self.folder is None:
            return extract_in_memory(option, source, extract, self.resize, wanted, self.batch_size, self.workers)
        return extract_features(
            option,
            source,
            extract,
            settings,
            self.resize,
            self.folder,
            self.accelerator,
            wanted=wanted,
            batch_size=self.batch_size,
            workers=self.workers,
        )


def check_size(option: str, source: ImageSource, resolution: int) -> None:
    """Raises InputError where the images of a set are not squares of this side."""
    width, height = size_of(option, source, Resize())
    require(
        width == height == resolution,
        f"{option}: the images have {width}×{height} pixels, but {resolution}×{resolution} are compared; bring all to "
        f"one size with --resolution {min(width, height, resolution)}.",
    )
