"""Words that headers may pass on: makers of scanners, model families, kernels; and words that mean a head. Pure.

What is returned is always a word of this file, or a number that is listed here: never the text that was looked at.
"""

import re
import unicodedata
from itertools import pairwise

OTHER = "other"
"""Something was written, and it is none of these words."""


def _words(*lines: str) -> frozenset[str]:
    return frozenset(word for line in lines for word in line.split())


_MANUFACTURERS = {
    "GE": "GE GEMS GENERALELECTRIC",
    "Siemens": "SIEMENS",
    "Philips": "PHILIPS",
    "Toshiba": "TOSHIBA",
    "Canon": "CANON",
    "Hitachi": "HITACHI",
    "Fujifilm": "FUJIFILM FUJI",
    "Neusoft": "NEUSOFT PNMS",
    "United Imaging": "UIH UNITEDIMAGING",
    "Samsung": "SAMSUNG",
    "NeuroLogica": "NEUROLOGICA",
    "Shimadzu": "SHIMADZU",
    "Picker": "PICKER",
    "Marconi": "MARCONI",
    "Elscint": "ELSCINT",
    "Imatron": "IMATRON",
    "Analogic": "ANALOGIC",
    "MinFound": "MINFOUND",
    "Anke": "ANKE",
    "SinoVision": "SINOVISION",
    "Mediso": "MEDISO",
    "Varian": "VARIAN",
    "Elekta": "ELEKTA",
    "Accuray": "ACCURAY",
    "Medtronic": "MEDTRONIC",
    "Brainlab": "BRAINLAB",
    "Planmeca": "PLANMECA",
    "KaVo": "KAVO",
    "Carestream": "CARESTREAM",
    "Vatech": "VATECH",
    "Morita": "MORITA",
    "NewTom": "NEWTOM",
    "Agfa": "AGFA",
}

_FAMILIES = _words(
    # GE
    "LightSpeed Discovery Revolution Optima BrightSpeed HiSpeed ProSpeed CT750 CT750HD CT660 CT680 CT670",
    "CT620 CT580 CT540 CT520 VCT Sytec CTi Omni Infinia Hawkeye Genesis CardioGraphe",
    # Siemens
    "SOMATOM Sensation Definition Emotion Biograph NAEOTOM Symbia Volume Balance Spirit Scope Perspective",
    "Force Drive Edge Confidence go X.cite X.ceed pro.Pulse",
    # Philips
    "Brilliance iCT Ingenuity IQon MX8000 MX Gemini Vereos Precedence AcQSim Access Incisive Tomoscan Secura",
    "Aura Spectral CT7500 CT5300 BrightView",
    # Toshiba, Canon
    "Aquilion Asteion Activion Alexion Astelion Auklet Xpress Xvision Xvigor Celesteion Cartesion Alphenix",
    # Hitachi, Fujifilm
    "Supria Eclos Scenaria Presto Pronto Radix Robusto CXR Persona",
    # Neusoft, United Imaging, Samsung and others
    "NeuViz uCT uMI CereTom BodyTom OmniTom ScintCare AnyScan Airo O-arm",
)
_VARIANTS = _words(
    "CT Plus Ultra QX QX/i Pro RT Xtra Power HD GSI ST STE RX LS MI IQ NM ES EVO Apex Frontier Maxima ACT",
    "Ascend Elite Select Advantage Dual NX/i FX/i LX/i DX/i CT/i Legend Expert Smart Cardiac Open AS AS+",
    "Flash DS Duo Cardio Spiral mCT TruePoint Vision Horizon Alpha Peak Up Top All Now Sim BOpt Fast",
    "Big Bore SP Core Flex IDT EXP TF GXL TOF Slice ONE PRIME CX CXL LB RXL LX Lightning Precision Serve",
    "Exceed Start Genesis Multi Super Digital GX Glory Epoch ACE Classic View Air",
)
_MODEL_WORDS = {word.upper(): word for word in _VARIANTS | _FAMILIES}
_FAMILY_KEYS = {word.upper() for word in _FAMILIES}
_MODEL_NUMBERS = _words(
    "1 2 3 4 5 6 7 8 10 12 16 20 24 32 38 40 50 56 60 64 68 70 80 90 96 100 128 160 256 320 384 500 510 512",
    "520 528 530 550 560 570 610 640 660 670 680 690 710 720 750 760 780 790 820 850 860 870 890 950 960 968",
    "3000 5100 5300 6000 7500 7800 8000",
)
"""Numbers in names of models: rows, slices, series. Listed one by one, because any digits can be a date or an id."""

_KERNEL_WORDS = _words(
    "STANDARD STD STND SOFT SMOOTH SHARP BONE LUNG DETAIL EDGE CHEST BRAIN BODY HEAD ABDOMEN NECK SPINE",
    "INNEREAR ULTRA BONEPLUS HD VASCULAR CARDIAC MEDIASTINUM TISSUE ROUTINE HIGHRES EXTRASHARP VERYSHARP",
    "MEDIUM IMR ULTRASHARP",
)
_KERNELS = re.compile(
    r"""
      [ABCDHIJQSTU]\d{2}[adfhmpsu]?           # Siemens: B30f, I31f, D30s, U90u
    | [ABCHINQSTU][abcdflmnprtuvxy]\d{2}[a-z]?  # Siemens: Br40d, Hr38, Qr40
    | [A-HLTUVXY]|[EUXY][ABCD]|C[BC]|XC[ABCD]|[UY][ABCDE]   # Philips: A to E, L, YA, EB
    | F[CL]\d{2}(?:-H)?                       # Toshiba and Canon: FC01 to FC86
    | [BHL]_(?:V?SHARP|V?SOFT|SMOOTH|STD|BONE|LUNG)_[ABCD]  # United Imaging
    | \d{1,2}                                 # Hitachi
    """,
    re.VERBOSE | re.ASCII,
)
_STRENGTHS = _words("1 2 3 4 5")
"""Of Siemens' iterations: I31f\\3."""

_HEAD_WORDS = _words(
    # English
    "HEAD BRAIN SKULL FACE FACIAL SINUS SINUSES PARANASAL NECK ORBIT ORBITS ORBITAL CRANIAL CRANIUM IAC",
    "TEMPORAL MASTOID MASTOIDS PITUITARY SELLA JAW MANDIBLE MAXILLA MAXILLOFACIAL DENTAL TEETH EAR EARS EYE",
    "EYES NASAL NOSE NASOPHARYNX PHARYNX LARYNX THYROID CSPINE CERVICAL CAROTID CAROTIDS TMJ PNS ENT HNC",
    "HEADNECK HEADANDNECK WHOLEBODY VERTEX STROKE",
    # German
    "KOPF SCHAEDEL SCHADEL GESICHT GESICHTSSCHAEDEL GESICHTSSCHADEL HALS NNH CCT KCT ORBITA KIEFER FELSENBEIN",
    "HWS GEHIRN HIRN HNO NASE OHR MITTELGESICHT SHT DVT",
    # French
    "TETE CRANE CEREBRAL CERVEAU ENCEPHALE COU MASSIF ORBITES ROCHER ROCHERS ORL",
    # Spanish, Portuguese
    "CABEZA CABECA CRANEO CRANIO CARA CUELLO PESCOCO SENOS SPN ORBITAS CEREBRO OIDO PENASCOS",
    # Italian
    "TESTA CAPO ENCEFALO COLLO FACCIALE FACCIA MASSICCIO SENI ROCCHE",
    # Dutch, Scandinavian
    "HOOFD SCHEDEL HERSENEN HERSENSCHEDEL AANGEZICHT SINUSSEN HUVUD HODE HOVED HJERNE HJARNA SKALLE ANSIKT",
    "ANSIGT",
    # Polish, Czech, Turkish
    "GLOWA GLOWY MOZG MOZGU ZATOKI TWARZ SZYJA SZYI HLAVA MOZEK KRK KAFA BEYIN BOYUN YUZ",
    # Russian
    "ГОЛОВА ГОЛОВЫ МОЗГ МОЗГА ШЕЯ ШЕИ ЧЕРЕП ЧЕРЕПА ЛИЦО",
)
_HEAD_SIGNS = ("頭", "头", "頸", "颈", "脑", "脳", "顔", "面部", "두부", "머리", "뇌")
"""Where words are not set apart by blanks."""


def manufacturer(text: str) -> str:
    """The maker that a text names; "other" for an unknown one, empty for none."""
    tokens = re.findall(r"[A-Z]+", _plain(text))
    joined = ["".join(pair) for pair in pairwise(tokens)]
    for name, keys in _MANUFACTURERS.items():
        if set(keys.split()) & {*tokens, *joined}:
            return name
    return OTHER if text.strip() else ""


def model(text: str) -> str:
    """Family, variant and size of a scanner, such as "LightSpeed 16"; words that are not listed are left out."""
    if not text.strip():
        return ""
    tokens = [token for chunk in re.split(r"[\s_,()]+", _plain(text)) for token in _model_tokens(chunk)]
    if not _FAMILY_KEYS & set(tokens):
        return OTHER
    # One number at most: several together can be a date.
    number = next((token for token in tokens if token in _MODEL_NUMBERS), None)
    found = [_MODEL_WORDS.get(token, token) for token in tokens if token in _MODEL_WORDS or token == number]
    return " ".join(dict.fromkeys(found))


def _model_tokens(chunk: str) -> list[str]:
    """Words and numbers of a piece without blanks: whole where it is listed whole, as CT/i is, else taken apart."""
    if chunk in _MODEL_WORDS:
        return [chunk]
    runs = re.findall(r"[A-Z/.+-]+|\d+", chunk)
    return [token for run in runs for token in ([run] if run in _MODEL_WORDS else re.split(r"[/.-]+", run))]


def kernel(parts: list[str]) -> str:
    """The kernel, its parts joined as DICOM does: "B30f", "I31f\\3", "STANDARD"; "other" where a part is unknown."""
    written = [part.strip() for part in parts if part.strip()]
    if not written:
        return ""
    first, *rest = written
    named = _kernel_part(first)
    if named is None or len(rest) > 1 or not all(part in _STRENGTHS for part in rest):
        return OTHER
    return "\\".join([named, *rest])


def _kernel_part(text: str) -> str | None:
    if _KERNELS.fullmatch(text):
        return text
    words = re.split(r"[\s_-]+", text.upper())
    is_known = all(word.removesuffix("+") in _KERNEL_WORDS for word in words)
    return " ".join(words) if is_known and len(words) <= 3 else None


def names_head(text: str) -> bool:
    """Whether a text speaks of a head, a face or a neck, in one of the languages that archives use."""
    tokens = re.findall(r"[^\W\d_]+", _plain(text))
    joined = ["".join(pair) for pair in pairwise(tokens)]
    return bool(_HEAD_WORDS & {*tokens, *joined}) or any(sign in text for sign in _HEAD_SIGNS)


def _plain(text: str) -> str:
    """Capitals without accents."""
    apart = unicodedata.normalize("NFKD", text.upper())
    return "".join(sign for sign in apart if not unicodedata.combining(sign))
