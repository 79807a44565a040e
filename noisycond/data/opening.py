"""From flags to training batches: source, transform, first stage and latent cache put together."""

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from noisycond.arguments import DataArguments, StreamArguments
from noisycond.captions import MASK_WORD
from noisycond.data.batches import Batches
from noisycond.data.caption_options import CaptionDataArguments
from noisycond.data.captions import (
    Captioned,
    Captions,
    Encode,
    StreamCaptions,
    caption_facts,
    caption_stream,
    open_captions,
)
from noisycond.data.controlled import Controlled, Controls
from noisycond.data.images import BadImages, LabelledImages, Transform
from noisycond.data.latent_cache import default_cache_dir, open_latent_cache
from noisycond.data.sources import ImageSource, check_number_of_classes, open_source
from noisycond.data.stream_batches import StreamBatches, StreamedImages
from noisycond.data.streams import StreamSource, open_stream
from noisycond.first_stage import FirstStage


@dataclass
class TrainingData:
    """The images of a run.

    Attributes:
        images: examples as pixels. bad_images: counts those that cannot be read, or have no caption.
        facts: what a resumed run must share, as JSON values.
        captions: of [`CaptionDataArguments`]; a stream's are drawn while it is read.
        controls: control images, see [`find_controls`].
    """

    images: LabelledImages | StreamedImages
    bad_images: BadImages
    facts: dict
    captions: Captions | StreamCaptions | None = None
    controls: Controls | None = None

    @property
    def source(self) -> ImageSource | StreamSource:
        return self.images.source


def open_training_data(args: DataArguments, keep_index: bool = True, mask_word: str = MASK_WORD) -> TrainingData:
    """Opens the dataset that the flags name; `keep_index` as for [`noisycond.data.sources.ImageFolder`], `mask_word`
    as for [`noisycond.captions.corrupt_words`].

    Raises:
        InputError: see [`noisycond.data.sources.open_source`], [`noisycond.data.streams.open_stream`] and
            [`noisycond.data.captions.open_captions`].
    """
    transform = Transform(
        args.resolution, args.center_crop, args.random_flip, args.image_interpolation_mode, seed=args.seed
    )
    bad_images, captions = BadImages(args.max_bad_images), None
    if isinstance(args, StreamArguments) and args.streaming:
        stream = open_stream(args)
        check_number_of_classes(args, stream.class_names)
        facts = {"dataset": stream.fingerprint, "shards": len(stream.shards), "class_names": stream.class_names}
        if isinstance(args, CaptionDataArguments):
            captions = caption_stream(args, stream, mask_word)
            facts |= caption_facts(captions)
        return TrainingData(StreamedImages(stream, transform), bad_images, facts, captions)
    source = open_source(args, keep_index=keep_index)
    facts = {}
    if isinstance(args, CaptionDataArguments):
        source, captions = open_captions(args, source, bad_images, mask_word)
        facts = caption_facts(captions)
    facts |= {"dataset": source.fingerprint, "examples": len(source), "class_names": source.class_names}
    return TrainingData(LabelledImages(source, transform), bad_images, facts, captions)


def find_controls(data: TrainingData, column: str) -> None:
    """Finds the control images of the data, not a stream, in the column that --control_column names.

    Raises:
        InputError: see [`noisycond.data.controlled.Controls`].
    """
    data.controls = Controls(data.source, column, data.images.transform)


def open_batches(
    args,
    data: TrainingData,
    accelerator: Accelerator,
    first_stage: FirstStage | None = None,
    encode: Encode | None = None,
    with_true_captions: bool = False,
) -> Batches:
    """This process's training batches: of latents where `--cache_latents` was given, of pixels otherwise.

    Args:
        encode: for data with captions, what makes tensors of them; see [`noisycond.data.captions.Captioned`].
        with_true_captions: see [`noisycond.data.captions.encoded`].

    Raises:
        InputError: too many unreadable images, or no space left for the cache.
    """
    assert (encode is None) == (data.captions is None), "captions and what encodes them go together"
    dataset = data.images
    if first_stage is not None and args.cache_latents:
        folder = Path(args.latent_cache_dir) if args.latent_cache_dir else default_cache_dir()
        dataset = open_latent_cache(data.images, first_stage, folder, accelerator, data.bad_images)
    shape = (
        args.train_batch_size,
        args.gradient_accumulation_steps,
        accelerator.num_processes,
        accelerator.process_index,
        args.seed,
        args.dataloader_num_workers,
    )
    if isinstance(dataset, StreamedImages):
        dataset = StreamedImages(dataset.source, dataset.transform, encode, with_true_captions)
        return StreamBatches(dataset, *shape, args.shuffle_buffer_size, args.max_bad_images)
    if data.controls is not None:
        dataset = Controlled(dataset, data.controls)
    if isinstance(data.captions, Captions):
        dataset = Captioned(dataset, data.captions, encode, with_true_captions)
    return Batches(dataset, *shape)
