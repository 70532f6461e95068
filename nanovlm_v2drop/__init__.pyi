from .dropping import (
    DROPPERS as DROPPERS,
)
from .dropping import (
    PUBLISHED_SCHEDULES as PUBLISHED_SCHEDULES,
)
from .dropping import (
    BatchSchedule as BatchSchedule,
)
from .dropping import (
    Chain as Chain,
)
from .dropping import (
    CountSchedule as CountSchedule,
)
from .dropping import (
    DropSchedule as DropSchedule,
)
from .dropping import (
    PrefillState as PrefillState,
)
from .dropping import (
    Random as Random,
)
from .dropping import (
    TokenDropper as TokenDropper,
)
from .dropping import (
    V2Drop as V2Drop,
)
from .inference import (
    Answer as Answer,
)
from .inference import (
    NotFinite as NotFinite,
)
from .inference import (
    NothingDropped as NothingDropped,
)
from .inference import (
    Prefilled as Prefilled,
)
from .inference import (
    Sampling as Sampling,
)
from .inference import (
    decode_one_token as decode_one_token,
)
from .inference import (
    generate as generate,
)
from .inference import (
    initial_state as initial_state,
)
from .inference import (
    prefill as prefill,
)
from .inference import (
    stream as stream,
)
from .loading.specs import (
    MODELS as MODELS,
)
from .loading.zoo import (
    VisionLanguageModel as VisionLanguageModel,
)
from .loading.zoo import (
    load as load,
)
from .models.config import (
    LlavaConfig as LlavaConfig,
)
from .models.config import (
    LlavaNextConfig as LlavaNextConfig,
)
from .models.config import (
    LlavaOnevisionConfig as LlavaOnevisionConfig,
)
from .models.config import (
    Qwen2_5_VLConfig as Qwen2_5_VLConfig,
)
from .models.config import (
    Qwen2VLConfig as Qwen2VLConfig,
)
from .models.config import (
    TextConfig as TextConfig,
)
from .models.config import (
    VisionConfig as VisionConfig,
)
from .models.config import (
    VLMConfig as VLMConfig,
)
from .models.decoder import (
    Decoder as Decoder,
)
from .models.kv_cache import (
    KVCache as KVCache,
)
from .models.qwen2_vl import (
    Qwen2_5_VLModel as Qwen2_5_VLModel,
)
from .models.qwen2_vl import (
    Qwen2VLModel as Qwen2VLModel,
)
from .models.vision import (
    VisionTrace as VisionTrace,
)
from .models.vlm import (
    LlavaModel as LlavaModel,
)
from .models.vlm import (
    LlavaNextModel as LlavaNextModel,
)
from .models.vlm import (
    LlavaOnevisionModel as LlavaOnevisionModel,
)
from .models.vlm import (
    PackedInputs as PackedInputs,
)
from .processing.prompts import (
    Request as Request,
)
from .report.watch import (
    watch as watch,
)
