"""The PIL image processor is used even if torchvision is installed: no other backend is chosen silently.

torchvision is not installed here; a separate process makes Transformers' checks for it succeed.
"""

import pytest
from forked import run_python

SCRIPT = """
import sys
import transformers.models.auto.image_processing_auto as auto
auto.is_torchvision_available = lambda: True
import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor
import pvlf_hf
processor = AutoProcessor.from_pretrained(sys.argv[1])
images = AutoImageProcessor.from_pretrained(sys.argv[1])
assert type(processor.image_processor) is type(images) is pvlf_hf.PVLFImageProcessor, (processor, images)
image = Image.fromarray(np.arange(32 * 40 * 3, dtype=np.uint8).reshape(32, 40, 3))
print(float(images(image, return_tensors="pt")["pixel_values"].double().sum()))
"""


@pytest.mark.slow
def test_processor_is_unchanged_by_torchvision(tiny_processor, tmp_path):
    import numpy as np
    from PIL import Image

    tiny_processor.save_pretrained(tmp_path)
    done = run_python(["-c", SCRIPT, tmp_path])
    assert done.returncode == 0, done.stderr[-2000:]
    image = Image.fromarray(np.arange(32 * 40 * 3, dtype=np.uint8).reshape(32, 40, 3))
    here = tiny_processor(images=image)["pixel_values"].double().sum()
    assert float(done.stdout.strip().splitlines()[-1]) == float(here)
