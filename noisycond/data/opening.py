"""From flags to training batches: source, transform, first stage and latent cache put together."""

from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from noisycond.arguments import DataArguments, StreamArguments
from noisycond.data.batches import Batches
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
        images: examples as pixels. bad_images: counts those that cannot be read.
        facts: what a resumed run must share, as JSON values.
    """

    images: LabelledImages | StreamedImages
    bad_images: BadImages
    facts: dict

    @property
    def source(self) -> ImageSource | StreamSource:
        return self.images.source


def open_training_data(args: DataArguments, keep_index: bool = True) -> TrainingData:
    """Opens the dataset that the flags name; `keep_index` as for [`noisycond.data.sources.ImageFolder`].

    Raises:
        InputError: see [`noisycond.data.sources.open_source`] and [`noisycond.data.streams.open_stream`].
    """
    transform = Transform(
        args.resolution, args.center_crop, args.random_flip, args.image_interpolation_mode, seed=args.seed
    )
    if isinstance(args, StreamArguments) and args.streaming:
        stream = open_stream(args)
        check_number_of_classes(args, stream.class_names)
        facts = {"dataset": stream.fingerprint, "shards": len(stream.shards), "class_names": stream.class_names}
        return TrainingData(StreamedImages(stream, transform), BadImages(args.max_bad_images), facts)
    source = open_source(args, keep_index=keep_index)
    facts = {"dataset": source.fingerprint, "examples": len(source), "class_names": source.class_names}
    return TrainingData(LabelledImages(source, transform), BadImages(args.max_bad_images), facts)


def open_batches(args, data: TrainingData, accelerator: Accelerator, first_stage: FirstStage | None = None) -> Batches:
    """This process's training batches: of latents where `--cache_latents` was given, of pixels otherwise.

    Raises:
        InputError: too many unreadable images, or no space left for the cache.
    """
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
        return StreamBatches(dataset, *shape, args.shuffle_buffer_size, args.max_bad_images)
    return Batches(dataset, *shape)
