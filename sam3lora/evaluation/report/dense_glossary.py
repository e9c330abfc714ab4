"""The metrics of dense predictions in the order of a report's table, explained in plain words."""

from __future__ import annotations

from sam3lora.evaluation.report.glossary import Measure

DENSE_MEASURES = (
    Measure(
        "mean_iou",
        "mean IoU",
        "Mean over classes of the intersection over union: of all pixels that have the class in the labels or in the "
        "prediction, the share that has it in both. Pixels of all images are summed first.",
    ),
    Measure("mean_iou_foreground", "mean IoU, without background", "The same without the background."),
    Measure("pixel_accuracy", "pixel accuracy", "Share of the pixels with the right class. Large classes decide it."),
    Measure("frequency_weighted_iou", "frequency-weighted IoU", "IoU of the classes, weighted by their true pixels."),
    Measure(
        "boundary_iou",
        "boundary IoU",
        "Mean IoU of the pixels near a contour (2 % of the image's diagonal): how well the outlines fit.",
    ),
    Measure("boundary_iou_foreground", "boundary IoU, without background", "The same without the background."),
    Measure("iou_per_image", "IoU per image", "IoU of the foreground at probability 0.50, averaged over images."),
    Measure("iou_pooled", "IoU, pooled", "The same of the pixels of all images together."),
    Measure("mae", "mean absolute error", "Of probabilities against labels. Lower is better."),
    Measure("s_measure", "S measure", "Whether probabilities have the structure of the labels, whole and in quarters."),
    Measure("e_max", "E measure, max", "Agreement of map and labels, pixel by pixel and as a whole; best threshold."),
    Measure("e_mean", "E measure, mean", "Averaged over thresholds."),
    Measure("e_adaptive", "E measure, adaptive", "At twice the mean probability of each image."),
    Measure("f_max", "F measure, max", "Precision and recall in one, precision weighs more; best threshold."),
    Measure("f_mean", "F measure, mean", "Averaged over thresholds."),
    Measure("f_adaptive", "F measure, adaptive", "At twice the mean probability of each image."),
    Measure(
        "f_max_mirror",
        "F measure, max, as papers on mirrors have it",
        "Of mean precision and mean recall; not comparable to the one above.",
    ),
    Measure("weighted_f", "weighted F measure", "Errors beside the object weigh less than those far away."),
    Measure("ber", "balanced error rate", "Mean error of foreground and background at 0.50. Lower is better."),
)
