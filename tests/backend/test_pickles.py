"""Configs, plans, backends and annotated models load from pickles, also from those of earlier versions, and new pickles of configs hold options only."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import pickletools
import zlib
from itertools import pairwise
from typing import Any

import pytest
from torch import nn

from approx_compile import ApproxConfig, Backend, TunedPlan, annotate
from approx_compile.backend.capture.annotate import full_name, whole_model
from approx_compile.config.plan_file import Tuned, TunedSite

SITE = TunedSite(name="0", op="addmm", shape="8x4x2", dtype="float32", ratio=0.5)
RECORD = Tuned(model="Net", torch="2.13.0", device="cpu", threads=1, max_error=0.5, sites=(SITE,))
PLAN = TunedPlan({"method": "exact", "rules": [{"layers": "0", "method": "topk", "ratio": 0.5}]}, RECORD)
RULES = [{"layers": "1", "grad": {"method": "crs"}}, {"layers": "head", "steps": "::2", "grad_weight": {"method": "zero"}}]
CONFIG = ApproxConfig(plan=PLAN, total_steps=100, rules=RULES)

OLD_PICKLE = """
c-rk(NpBoQ6t+F9JvOnOI6-lQ!~tXr$&8mn6ogDzG>3_rD2oD8P^sKqGq2*Fu2yxmJw}R>fRfl!NkO7Gz?DD1jVm|cf;b?!=EM~^AhG1YtL~Ye#iKwXBo1T_)3v;+w|(!`dp8Ro-JcyxeoK0RhM^Q~
;)+(teYWC?puw9)PoGWJUrVPSn&n&Ox>?d?LOkv&LXugr#S{q7=mKj~SK(Ju#f7PD-cRq>g%%IUwyDqRLQ{%3G&)aXC5$ddv=#b1Kvt!Okh@gkHN{Z)+}%SWS44PS*%!M^S|XU%MG>noR>sl!rlcNz
r|g&TAYH8_vt7oUV5fx$sAM=OQ;&v<?=W*nSw**e78yNrwnK8sE@aw5!77<kG)9d+PJW;0qE9`KNwZYj{47<nw)y$g%i*U#Ow~5O=&pR(UHP`V@_i%uWu~cZ{@7jlIbE^#V^Rv)$E}nq9a(mddesh-
d#3(Xtmg>{_dFUX?h@8klA`+@eWGu*!I|$xBx2UH_l!Q)w--vjLlv`U;w|)WY)uAF>->dy*j7-|c_qSa1CyC>Fy%nSff)ymI56kHyaPuaIOf2D1IHa}&OIj42jf+98>NmE3nS~k5NL$%i{Uv3p1+58
PeKW*AHWhy0WS<NbzssN#Ri3(tRW~ycoikhxyUv<smHG+pmC{hL6fI#ZpE0|qRIsl2-)hFrPPt5s|Hl{_$tZ|>ke%6(N*E-BT1YZ2Ia0?NpL(`^8C9@ik|4O>A))}vf_#8xk!1VWKE>Z1H;g<g6iCv
Gizo*+I5t7A*H^HF&O$ZKqw5wj9o={6)wdA^M*pD&=MZ=jm|mDB2WqG0!H=P%If+`6$c*M;V#Bu&JAOXdj%4uiA;T5Pqt{Abiv<6&a;l53njA&hj}Cl8S^lMWFXhG)CG<(@9jBy#sY{W>4>zf2TRF9
GR#Y{+gTD}$h^eiTv<53ttS(OF5+}ZseC|N%)qLi5SYFS82zo5NzzM*suWJQH`;6X_0*o7mm0pHYJIIg1dy1bl%_T|*3~Q<>LS`862TzS73@F+?bH{yO>c{V3oU2>0h(^=iV}+YB#oQ8rz;H};5<#p
wau?PiDU}mCL<wjqPF|G%mXiW(LbnW@A4z?7TmxnTkasHYn1aA2-y=*5|}ClVjuw{lwtXuWLSk&oW9tncT8ghL4p&ws>_I=77LU;h;knv!qpaaw^@LXK<U-aDC1b{JW7zmXTt^bGy+|p7`mXhQ@+?8
W>-{b6!B(|@?V09fq+6C`twzN7Ai0eGw>8zWESRdJeaiL1T4bxP)HAG{_v!Srdk`$6zgezgN;Yaa4+>=`o`f)Hy$?yolCF0boffl5nU<o8br)hxZ%Lf3~6v{AKrua2T`?*y4{2u9YOw&*1z-LnQG|?
QvcDF`0P%fm%=8-k?*dxe&^KT*LA>XI&Ytq5%qvob3Q$xp2W_-i3j-RF?|K!J;X_mm*A4xhqv(AJM>6}R4FEH0hPZ3toN!S)1P$VV)BS*k5*n`wQk_Dt%|8srap$i!qNrnmSUtN_n4_q;8R*mYURk*
=kQB*->;p~Z#s9ndd9%-_4DwD1Ao@Xk?cX5k{&p==Eh=xwJq)b!5w6BVE@PW_wj$?!2aiAWHQ5pfXS{Rwu%w~NlHX)y|x+FSlEAs5SarcUQ9~Al^|HbiqJL;D_D)#HUbL=RQ&=wce$^p#Eygqw#(bs
6)aIC)?3Q<1lRE?CtGo&(U~k_9gaM4#<AQ9RCmwzEw*bpN^B8fTS;tM7y%)+(a;rF_&#&fnnhRMl-Rv7?{zFHtq2#4KGHju9=UdEd~D3_949;?jo9}GDNy65NT+EXK5}w!gY0qz#2#(-5uF+$qW&)3
iwO1}K7uAAo6pF4>SUYG9NrwwYz}Kf+rK4!`_Lr|{d*&roFrJydVfQ-c$f&g_hG6s=|I7HvV={$Pq7s^z*ciGL`YI@>oF_b&`zhj7>+3#1j6!0B$IPI*iPMQ!*Jy<%i`un
"""
"""`(CONFIG, PLAN, Backend(CONFIG), annotate(nn.ReLU()))` as pickled before the modules stood in folders."""


def names_in(pickled: bytes) -> set[str]:
    """Return the functions and classes of this package that a pickle names."""
    texts = [arg for _, arg, _ in pickletools.genops(pickled) if isinstance(arg, str)]
    return {f"{module}.{name}" for module, name in pairwise(texts) if module.startswith("approx_compile")}


def test_pickles_of_earlier_versions_load() -> None:
    config, plan, backend, module = pickle.loads(zlib.decompress(base64.b85decode("".join(OLD_PICKLE.split()))))
    assert config == CONFIG and config.digest() == CONFIG.digest() and hash(config) == hash(CONFIG)
    assert plan == PLAN and backend == Backend(CONFIG) and backend.schedule == Backend(CONFIG).schedule
    assert full_name(module) == "" and whole_model(module) is None
    assert pickle.loads(pickle.dumps(config)) == CONFIG


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])  # 2 is that of torch.save
def test_a_pickled_config_names_no_class(protocol: int) -> None:
    pickled = pickle.dumps(CONFIG, protocol)
    assert pickle.loads(pickled) == CONFIG
    if protocol > 2:  # where names stand apart from their modules
        assert names_in(pickled) == {"approx_compile.config.unpickle"}
    else:
        assert [arg for op, arg, _ in pickletools.genops(pickled) if op.name == "GLOBAL"] == ["approx_compile.config unpickle"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": "cost"},
        {"ratio": 0.5},  # the default, which makes the policy "cost"
        {"ratio": 0.5, "policy": "adaptive", "rules": [{"layers": "a", "output": "topk"}]},
        {"grad": {"axis": "rows", "ratio": 0.25, "batch_norm": "approximate"}, "inductor": {"max_autotune": False, "mode": None}},
        {"adaptive": {"tau": 0.1, "ladder": [0.5]}, "huge_pages": False},
        {"rules": [{"layers": ["a", "re:b+"], "phase": "warm", "grad_weight": {"method": "max", "tile": 0.5}}]},
        {"plan": PLAN, "ratio": 0.25, "rules": [{"layers": "site", "method": "exact"}]},
        {"plan": {"ratio": 0.25}, "method": "exact"},
    ],
)
def test_options_make_an_equal_config(options: dict[str, Any]) -> None:
    config = ApproxConfig(**options)
    again = ApproxConfig(**config.options())
    assert again == config and again.digest() == config.digest() and again.options() == config.options()
    assert ApproxConfig(**json.loads(json.dumps(config.options()))) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_the_settings_of_every_step_can_be_pickled() -> None:
    for step in (0, 1, 85):
        config = CONFIG.at(step)
        assert pickle.loads(pickle.dumps(config)) == config


def test_a_pickled_backend_keeps_its_arguments() -> None:
    backend = pickle.loads(pickle.dumps(Backend(CONFIG, inner_compile=print, keep_graphs=True)))
    assert backend == Backend(CONFIG, inner_compile=print, keep_graphs=True) and backend != Backend(CONFIG)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_an_annotated_model_keeps_the_names_and_has_no_link(duplicate: Any) -> None:
    model = annotate(nn.Sequential(nn.ReLU(), nn.Sequential(nn.ReLU())))
    again = duplicate(model)
    assert full_name(again[1][0]) == "1.0" and whole_model(again[1]) is None and whole_model(model[1]) is model
